"""Memory that runs out, a disk that is full, found or survived: with faults put in where they would happen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from folora_q.cli.app import main
from folora_q.errors import RunError
from folora_q.models.adapters import adapter_pairs
from folora_q.recipe import load_recipe
from folora_q.training import step_guards as guards
from folora_q.training.step_guards import longest_rows
from tests.training.trainer_test import trainer_of

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB"


class Fault:
    """Memory runs out in the forward or backward pass of the last layer, where a batch has more rows than fit."""

    def __init__(self, model: torch.nn.Module, fits: int, backward: bool) -> None:
        self.fits, self.backward = fits, backward
        self.taken: list[int] = []
        self.layer = model.get_base_model().model.layers[0].mlp.down_proj
        self.handle = self.layer.register_forward_hook(self.forward)

    def forward(self, module, args, output) -> None:
        rows = len(output)
        self.taken.append(rows)
        if rows <= self.fits:
            return
        if not self.backward:
            raise RuntimeError(FULL)
        if output.requires_grad:
            output.register_hook(lambda gradient: (_ for _ in ()).throw(RuntimeError(FULL)))


def trained(recipe, fits: int | None, backward: bool = False) -> tuple[list[torch.Tensor], list[str], list[float]]:
    trainer = trainer_of(recipe)
    told: list[str] = []
    trainer.micro_batches.splitter.tell = told.append
    if fits is not None:
        Fault(trainer.model, fits, backward)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return [p.detach().clone() for pair in adapter_pairs(trainer.model) for p in (pair.a, pair.b)], told, losses


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("backward", [False, True])
def test_halved_micro_batches_train_the_same_adapter(recipe_file: Path, accumulation: int, backward: bool) -> None:
    recipe = load_recipe(recipe_file, [f"training.gradient_accumulation_steps={accumulation}"])
    expected, _, losses = trained(recipe, None)
    found, told, halved_losses = trained(recipe, 1, backward)
    assert told == [
        "memory ran out while training on 4 sequences at a time; continuing with 2",
        "memory ran out while training on 2 sequences at a time; continuing with 1",
    ]
    assert halved_losses == pytest.approx(losses, rel=1e-5)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_memory_that_runs_out_later_in_a_step_takes_the_whole_step_again(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["training.gradient_accumulation_steps=3"])
    expected, _, _ = trained(recipe, None)
    trainer = trainer_of(recipe)
    told: list[str] = []
    trainer.micro_batches.splitter.tell = told.append
    fault = Fault(trainer.model, 4, backward=True)
    step = trainer.training_step
    calls: list[int] = []

    def watched(*args, **kwargs):
        calls.append(1)
        fault.fits = 2 if len(calls) == 6 else 4  # not in the rehearsal; in the second step's second micro-batch
        return step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    assert len(told) == 1
    found = [p.detach() for pair in adapter_pairs(trainer.model) for p in (pair.a, pair.b)]
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_one_sequence_that_does_not_fit_ends_the_run_before_its_first_step(
    recipe_file: Path, capfd, monkeypatch
) -> None:
    trainer = trainer_of(load_recipe(recipe_file))
    Fault(trainer.model, 0, backward=False)
    with pytest.raises(RunError, match="memory ran out while training on, with 1 sequences of 3[0-9] tokens"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = trainer_of(load_recipe(recipe_file, ["training.auto_batch_size=false"]))
    Fault(trainer.model, 2, backward=False)
    with pytest.raises(RunError, match="with 4 sequences"):
        trainer.train()


def test_a_rehearsal_changes_nothing(recipe_file: Path, monkeypatch) -> None:
    recipe = load_recipe(recipe_file, ["adapter.lora_dropout=0.3", "evaluation.steps=2", "training.save_steps=2"])
    with_rehearsal, _, losses = trained(recipe, None)
    monkeypatch.setattr("folora_q.training.trainer.GatedTrainer.rehearse", lambda self: None)
    without, _, others = trained(recipe, None)
    assert losses == others
    assert all(torch.equal(one, other) for one, other in zip(with_rehearsal, without, strict=True))
    assert not (Path(recipe.training.output_dir) / ".rehearsal").exists()


def test_the_longest_rows_are_rehearsed(recipe_file: Path) -> None:
    rows = trainer_of(load_recipe(recipe_file)).train_dataset
    lengths = sorted((len(row["input_ids"]) for row in rows), reverse=True)
    assert [len(row["input_ids"]) for row in longest_rows(rows, 3)] == lengths[:3]
    assert [len(row["input_ids"]) for row in longest_rows(rows.select([5, 2]), 3)] == sorted(
        (len(rows[i]["input_ids"]) for i in (5, 2)), reverse=True
    )


def test_a_disk_that_cannot_take_the_checkpoints_is_found_before_the_first_step(
    recipe_file: Path, tmp_path: Path, capfd, monkeypatch
) -> None:
    arguments = ["train", str(recipe_file), "training.save_steps=2", "evaluation.metric=none", "gate.enabled=false"]
    monkeypatch.setattr(guards, "free_bytes", lambda folder: 1000)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 1
    error = capfd.readouterr().err
    assert "the checkpoints of this run need 0.0 GB" in error and "lower training.save_total_limit" in error
    lines = (tmp_path / "run" / "metrics.jsonl").read_text() if (tmp_path / "run" / "metrics.jsonl").exists() else ""
    assert "loss" not in lines
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
