"""Several processes compute the run of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from folora_q.calibration import reading, sample_cache
from folora_q.calibration.gate_store import load_gates
from folora_q.cli.app import main
from folora_q.data.tokens import Batch
from folora_q.errors import RunError
from folora_q.memory.micro_batches import divided_among
from folora_q.models.adapters import adapter_pairs
from folora_q.recipe import load_recipe
from folora_q.training.checkpoints import damage
from folora_q.training.trainer import GatedTrainer
from folora_q.workflows.train import TrainingRequest, run_training
from folora_q.workflows.training_run import TrainingRun
from tests.conftest import Silent
from tests.distributed.together import KILLED, run_together, together
from tests.forked import in_a_child

STEPS = ["logging.logging_steps=1", "training.max_steps=20", "training.save_steps=10", "gate.num_task_samples=9"]
EIGHT_ROWS = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4"]


def one(recipe_file: Path, folder: Path, *overrides: str) -> None:
    arguments = ["train", str(recipe_file), *STEPS, *EIGHT_ROWS, f"training.output_dir={folder}", *overrides]
    assert in_a_child(lambda: main(arguments)) == 0


def several(
    count: int, recipe_file: Path, folder: Path, *overrides: str, before: Callable[[int], None] = lambda rank: None
) -> str:
    """Run together, and return what the first process printed."""
    codes, texts = outcome(count, recipe_file, folder, *overrides, before=before)
    assert codes == [0] * count, "\n".join(texts)
    assert texts[1:] == [""] * (count - 1), "the first process speaks for all"
    return texts[0]


def outcome(
    count: int, recipe_file: Path, folder: Path, *overrides: str, before: Callable[[int], None] = lambda rank: None
) -> tuple[list[Any], list[str]]:
    """Run together, and return exit codes and outputs by rank."""
    arguments = ["train", recipe_file, *STEPS, *EIGHT_ROWS, f"training.output_dir={folder}", *overrides]
    output = folder.with_suffix(".txt")
    for file in folder.parent.glob(f"{output.name}-*"):
        file.unlink()
    codes = run_together(count, arguments, output, before)
    return codes, [Path(f"{output}-{rank}").read_text() for rank in range(count)]


def in_step(number: int, act: Callable[[Any], None]) -> None:
    """Let this process do something at the beginning of a step; `act` gets the trainer."""
    step = GatedTrainer.training_step

    def acting(self: GatedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == number and self.callback_handler.train_dataloader is not None:
            act(self)
        return step(self, *args, **kwargs)

    GatedTrainer.training_step = acting


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def measurements(folder: Path) -> list[dict[str, float]]:
    """The measurements on the way, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k.startswith("eval_") and v is not None}
        for line in lines
        if "eval_loss" in line
    ]


def evaluated(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "evaluation.json").read_text())["texts"]


def assert_the_same(one: Path, other: Path) -> None:
    """Check that gates, losses and BA are equal; a row of A and its column of B may both change their sign."""
    if (one / "gates.safetensors").exists():
        gates, others = (load_gates(folder / "gates.safetensors") for folder in (one, other))
        for name, gate in gates.items():
            difference = (others[name].quotients - gate.quotients).abs().max()
            assert float(difference) <= 1e-5 * float(gate.quotients.max()), name
    assert losses(other) == pytest.approx(losses(one), rel=1e-4)
    updates, found = (updates_of(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert found.keys() == updates.keys()
    for name, update in updates.items():
        assert float((found[name] - update).norm()) <= 1e-3 * float(update.norm()), name


def updates_of(adapter: Path) -> dict[str, torch.Tensor]:
    weights = load_file(adapter)
    return {name: weights[name.replace("lora_A", "lora_B")] @ a for name, a in weights.items() if "lora_A" in name}


@pytest.mark.parametrize("rule", ["frozen", "step", "spectral"])
def test_two_processes_take_the_steps_of_one(recipe_file: Path, tmp_path: Path, rule: str) -> None:
    rule = f"gate.rule={rule}"
    one(recipe_file, tmp_path / "one", rule)
    several(2, recipe_file, tmp_path / "two", rule)
    assert_the_same(tmp_path / "one", tmp_path / "two")


def test_two_processes_train_the_next_task_as_one(recipe_file: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    one(recipe_file, first, "training.max_steps=2")
    given = ("gate.rule=frozen", f"model.adapter={first}", "adapter.r=2")
    one(recipe_file, tmp_path / "one", *given)
    several(2, recipe_file, tmp_path / "two", *given)
    assert_the_same(tmp_path / "one", tmp_path / "two")
    kept = [(tmp_path / name / "earlier" / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert kept[0] == kept[1]
    texts, others = (
        [text for text in evaluated(tmp_path / name) if text["kind"] == "earlier"] for name in ("one", "two")
    )
    assert len(texts) == len(others) == 1 and others[0]["tokens"] == texts[0]["tokens"]
    for key in ("base", "tuned"):
        assert others[0]["loss"][key]["value"] == pytest.approx(texts[0]["loss"][key]["value"], rel=1e-3)


def test_four_processes_do_too_and_measuring_on_the_way_changes_nothing(recipe_file: Path, tmp_path: Path) -> None:
    one(recipe_file, tmp_path / "one")
    one(recipe_file, tmp_path / "measured", "evaluation.steps=5")
    several(4, recipe_file, tmp_path / "four", "evaluation.steps=5")
    assert_the_same(tmp_path / "one", tmp_path / "four")
    measured, found = (measurements(tmp_path / name) for name in ("measured", "four"))
    assert len(found) == 5 and found == [pytest.approx(each, rel=1e-3, abs=1e-5) for each in measured]
    for text, other in zip(*(evaluated(tmp_path / name) for name in ("measured", "four")), strict=True):
        assert other["tokens"] == text["tokens"] and other["texts"] == text["texts"]
        for key in ("base", "tuned"):
            assert other["loss"][key]["value"] == pytest.approx(text["loss"][key]["value"], rel=1e-3)


def test_all_have_the_same_adapter_to_the_last_bit(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, [*STEPS, *EIGHT_ROWS, f"training.output_dir={tmp_path / 'two'}"])

    def digest(rank: int) -> str:
        digests: list[str] = []
        train = TrainingRun.train

        def recording(self: TrainingRun, trainer: GatedTrainer) -> None:
            train(self, trainer)
            weights = [p.detach().numpy().tobytes() for pair in adapter_pairs(trainer.model) for p in (pair.a, pair.b)]
            digests.append(hashlib.sha256(b"".join(weights)).hexdigest())

        TrainingRun.train = recording
        run_training(TrainingRequest(recipe=recipe), Silent())
        return digests[0]

    found = together(2, digest)
    assert len(set(found)) == 1 and KILLED not in found


def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_in_all(recipe_file: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        compute = GatedTrainer.compute_loss

        def broken(self: GatedTrainer, *args: Any, **kwargs: Any) -> Any:
            loss = compute(self, *args, **kwargs)
            return loss * float("nan") if rank == 1 and self.state.global_step == 3 and self.step_in_hand == 3 else loss

        GatedTrainer.compute_loss = broken

    several(2, recipe_file, tmp_path / "two", before=before)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [4]
    assert len(losses(tmp_path / "two")) == 19


def test_memory_that_runs_out_in_one_process_splits_the_batches_of_all(recipe_file: Path, tmp_path: Path) -> None:
    one(recipe_file, tmp_path / "one")

    def before(rank: int) -> None:
        compute = GatedTrainer.compute_loss

        def failing(self: GatedTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if rank == 1 and len(inputs["input_ids"]) > 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return compute(self, model, inputs, *args, **kwargs)

        GatedTrainer.compute_loss = failing

    several(2, recipe_file, tmp_path / "two", before=before)
    assert_the_same(tmp_path / "one", tmp_path / "two")


def test_a_signal_to_one_process_stops_all_after_the_step_and_the_run_resumes_exactly(
    recipe_file: Path, tmp_path: Path
) -> None:
    dropout = "adapter.lora_dropout=0.1"
    several(2, recipe_file, tmp_path / "whole", dropout)

    def before(rank: int) -> None:
        if rank == 1:
            in_step(3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))

    folder = tmp_path / "stopped"
    codes, texts = outcome(2, recipe_file, folder, dropout, before=before)
    assert codes == [143, 143], texts
    assert "torchrun --nproc-per-node 2 -m folora_q train" in texts[0] and "--resume" in texts[0]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    several(2, recipe_file, folder, dropout, "--resume")
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_number_of_processes_resumes_with_the_same_rows(recipe_file: Path, tmp_path: Path) -> None:
    one(recipe_file, tmp_path / "one")
    folder = tmp_path / "two"

    def before(rank: int) -> None:
        in_step(13, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))

    codes, _ = outcome(2, recipe_file, folder, before=before)
    assert codes == [143, 143]
    one(recipe_file, folder, "--resume")
    assert_the_same(tmp_path / "one", folder)


def test_a_killed_process_ends_the_others_and_leaves_complete_checkpoints(recipe_file: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        if rank == 1:
            in_step(12, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))

    began = time.monotonic()
    codes, texts = outcome(2, recipe_file, tmp_path / "two", before=before)
    assert codes == [1, KILLED] and time.monotonic() - began < 60
    assert "another process of this run has ended" in texts[0] and "Traceback" not in texts[0]
    (checkpoint,) = (tmp_path / "two").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-10" and damage(checkpoint) is None
    assert json.loads((tmp_path / "two" / "run.json").read_text())["status"] == "failed"


def test_a_process_that_fails_says_so_and_the_first_one_does_not_guess(recipe_file: Path, tmp_path: Path) -> None:
    def fail(trainer: GatedTrainer) -> None:
        raise RunError("the second card is broken", "replace it")

    def before(rank: int) -> None:
        if rank == 1:
            in_step(3, fail)

    codes, texts = outcome(2, recipe_file, tmp_path / "two", before=before)
    assert codes == [1, 1]
    assert "process 1: the second card is broken" in texts[1]


def test_rows_that_do_not_divide_are_an_error_that_names_the_numbers_that_do(recipe_file: Path, tmp_path: Path) -> None:
    codes, texts = outcome(3, recipe_file, tmp_path / "three")
    assert codes == [2, 2, 2] and texts[1:] == ["", ""]
    assert "the 8 rows of a step" in texts[0] and "start one of 1, 2, 4, 8 processes" in texts[0]
    recipe = load_recipe(recipe_file, EIGHT_ROWS)
    assert divided_among(recipe, 8).training.per_device_train_batch_size == 1


def test_torchrun_starts_it(recipe_file: Path, tmp_path: Path) -> None:
    one(recipe_file, tmp_path / "one")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "folora_q", "train"]
    arguments = [str(recipe_file), *STEPS, *EIGHT_ROWS, f"training.output_dir={tmp_path / 'two'}"]
    done = subprocess.run([sys.executable, *torchrun, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("What was learned, what was forgotten") == 1
    assert_the_same(tmp_path / "one", tmp_path / "two")


def test_each_process_samples_and_reads_a_part(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, [*STEPS, *EIGHT_ROWS, f"training.output_dir={tmp_path / 'two'}"])

    def counts(rank: int) -> tuple[int, int]:
        sampled: list[int] = []
        read: list[int] = []
        sample, feed = sample_cache.sample_proxy, reading._backward

        def sampling(*args: Any, **kwargs: Any) -> Any:
            found = sample(*args, **kwargs)
            sampled.append(len(found))
            return found

        def feeding(model: Any, part: Batch, *args: Any) -> None:
            read.append(int(part.attention_mask.sum()))
            feed(model, part, *args)

        sample_cache.sample_proxy, reading._backward = sampling, feeding
        run_training(TrainingRequest(recipe=recipe), Silent())
        return sum(sampled), sum(read)

    (first, read), (second, read_by_second) = together(2, counts)
    assert (first, second) == (3, 3)
    assert min(read, read_by_second) > 0.3 * max(read, read_by_second)
    texts = [json.loads(line)["ids"] for line in (tmp_path / "two" / "proxy.jsonl").read_text().splitlines()]
    assert len(texts) == 6 == len({tuple(ids) for ids in texts})


@pytest.mark.parametrize(
    "settings",
    [
        ["gate.enabled=false"],
        ["training.packing=true", "training.max_length=64"],
        ["evaluation.steps=5", "training.load_best_model_at_end=true", "training.save_steps=5"],
        ["gate.covariance=activation", "training.activation_checkpointing=true"],
        ["gate.budget={kl: 0.05}", "gate.rule=frozen", "evaluation.num_proxy_samples=1"],
    ],
    ids=lambda settings: settings[0],
)
def test_other_settings_give_one_processs_run_too(recipe_file: Path, tmp_path: Path, settings: list[str]) -> None:
    one(recipe_file, tmp_path / "one", *settings)
    several(2, recipe_file, tmp_path / "two", *settings)
    assert_the_same(tmp_path / "one", tmp_path / "two")


def kept(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "evaluation.json").read_text())["kept"]


def test_two_processes_keep_what_one_keeps(recipe_file: Path, tmp_path: Path) -> None:
    keep = ["keep=[arithmetic]", "keep.max_new_tokens=2"]
    one(recipe_file, tmp_path / "one", *keep)
    for name in ("keep", "penalty"):  # both processes answer, and collect statistics
        shutil.rmtree(Path(os.environ["FOLORA_Q_CACHE"]) / name)
    several(2, recipe_file, tmp_path / "two", *keep)
    assert_the_same(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "keep.jsonl").read_bytes() == (tmp_path / "one" / "keep.jsonl").read_bytes()
    [alone], [together_kept] = kept(tmp_path / "one"), kept(tmp_path / "two")
    assert together_kept["kl"]["value"] == pytest.approx(alone["kl"]["value"], rel=1e-3)
    assert together_kept["score"] == alone["score"]
