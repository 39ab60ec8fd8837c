"""Train a recipe in its run folder, and record there how the run ended."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from folora_q.distributed.launch import launched_processes
from folora_q.distributed.processes import ENDED, lost_another, start_processes
from folora_q.errors import OtherProcessError
from folora_q.progress import Progress, Silence, StageTimer
from folora_q.runs.earlier import read_earlier, require_run
from folora_q.runs.folder import RunFolder, check_run_folder
from folora_q.runs.lock import locked
from folora_q.storage.redaction import conceal
from folora_q.workflows.prepare_training import Place, TrainingRequest, prepare
from folora_q.workflows.training_run import TrainingResult, TrainingRun

__all__ = ["TrainingRequest", "TrainingResult", "run_training"]


def run_training(request: TrainingRequest, progress: Progress) -> TrainingResult | None:
    """Run a recipe from its data to its evaluation.

    Returns:
        The result; None in all but the first of several processes.

    Raises:
        UserError: the recipe, the data or the folder is wrong (found before the model is loaded, where possible), or
            the launcher's settings contradict it (found before anything is written).
        RunError: the run failed. If only its evaluation failed, the trained adapter is kept.
    """
    processes = start_processes(launched_processes())
    timer = StageTimer(progress if processes.first else Silence())
    target = Path(request.recipe.training.output_dir)
    with ExitStack() as stack:

        def claim() -> dict[str, Any] | None:
            if request.resume:
                require_run(target)
            stack.enter_context(locked(target, timer.note))
            earlier = read_earlier(RunFolder(target)) if request.resume else None
            if earlier is None:
                check_run_folder(target, request.overwrite)
            if request.resume and earlier is None:
                timer.note(f"the run in {target} was killed before its first file: it starts again")
            return earlier

        earlier = processes.share(claim)
        scratch = None if processes.first else Path(stack.enter_context(TemporaryDirectory(prefix="folora-q-")))
        prepared = prepare(request, earlier, timer, Place(processes, scratch))
        try:
            result = TrainingRun(prepared, timer).run()
            processes.end()
            return result
        except BaseException as error:
            if processes.count > 1 and lost_another(error):
                error = OtherProcessError(ENDED)
            interrupted = not isinstance(error, Exception)  # or the reader of our output has closed it
            prepared.manifest.update(status="interrupted" if interrupted else "failed", error=conceal(str(error)))
            prepared.manifest["stages"] = timer.to_list()
            prepared.folder.write_manifest(prepared.manifest)
            if isinstance(error, KeyboardInterrupt):
                raise type(error)(f"the run is in {target}, marked as interrupted") from None
            raise error
