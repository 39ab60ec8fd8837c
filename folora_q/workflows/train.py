"""Train a recipe in its run folder, and record there how the run ended."""

from __future__ import annotations

from pathlib import Path

from folora_q.distributed import require_one_process
from folora_q.progress import Progress, StageTimer
from folora_q.runs.earlier import read_earlier, require_run
from folora_q.runs.folder import RunFolder, check_run_folder
from folora_q.runs.lock import locked
from folora_q.storage.redaction import conceal
from folora_q.workflows.prepare_training import TrainingRequest, prepare
from folora_q.workflows.training_run import TrainingResult, TrainingRun

__all__ = ["TrainingRequest", "TrainingResult", "run_training"]


def run_training(request: TrainingRequest, progress: Progress) -> TrainingResult:
    """Run a recipe from its data to its evaluation.

    Raises:
        UserError: the recipe, the data or the folder is wrong (found before the model is loaded, where possible), or
            this is one of several processes (found before anything is written).
        RunError: the run failed. If only its evaluation failed, the trained adapter is kept.
    """
    require_one_process()
    timer = StageTimer(progress)
    target = Path(request.recipe.training.output_dir)
    if request.resume:
        require_run(target)
    with locked(target, timer.note):
        earlier = read_earlier(RunFolder(target)) if request.resume else None
        if earlier is None:
            check_run_folder(target, request.overwrite)
        if request.resume and earlier is None:
            timer.note(f"the run in {target} was killed before its first file: it starts again")
        prepared = prepare(request, earlier, timer)
        try:
            return TrainingRun(prepared, timer).run()
        except BaseException as error:
            interrupted = not isinstance(error, Exception)  # or the reader of our output has closed it
            prepared.manifest.update(status="interrupted" if interrupted else "failed", error=conceal(str(error)))
            prepared.manifest["stages"] = timer.to_list()
            prepared.folder.write_manifest(prepared.manifest)
            if isinstance(error, KeyboardInterrupt):
                raise type(error)(f"the run is in {target}, marked as interrupted") from None
            raise
