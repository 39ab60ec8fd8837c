"""Numbers that go wrong on the way to a gate, and settings that must not change any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from folora_q.models.adapters import adapter_pairs
from folora_q.recipe import load_recipe
from folora_q.workflows import calibration
from tests.faults.commands import assert_the_same_run, manifest, metrics, run
from tests.training.trainer_test import trainer_of

SPOILED = "model.layers.1.mlp.down_proj"


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool], shape: tuple[int, ...] = ()) -> list[int]:
    """Let torch.linalg.eigh fail to converge in some of its calls, counted from 1, of matrices of a shape or of any."""
    solve, calls = torch.linalg.eigh, [0]

    def eigh(matrix: torch.Tensor) -> object:
        if not shape or matrix.shape[-2:] == shape:
            calls[0] += 1
            if fails(calls[0]):
                raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return calls


def test_an_activation_that_is_not_finite_is_refused_with_its_layer_and_no_gate_is_written(
    demanding: list[object], tmp_path: Path, monkeypatch, capfd
) -> None:
    build = calibration.build_gates

    def spoiled(model, *rest):
        layer = model.get_base_model().get_submodule(SPOILED)
        layer.register_forward_pre_hook(lambda _, args: (args[0] * torch.inf, *args[1:]), prepend=True)
        return build(model, *rest)

    monkeypatch.setattr(calibration, "build_gates", spoiled)
    assert run(*demanding) == 1
    folder = tmp_path / "stopped" / "run"
    assert f"error: the activations hold a NaN or an infinity, at the input of {SPOILED}" in capfd.readouterr().err
    assert manifest(folder)["status"] == "failed"
    assert not (folder / "gates.safetensors").exists() and not (folder / "gates.json").exists()


def test_a_gate_that_cannot_be_solved_for_is_named(demanding: list[object], tmp_path: Path, monkeypatch, capfd) -> None:
    failing(monkeypatch, lambda call: True)
    assert run(*demanding) == 1
    talk = capfd.readouterr().err
    assert "error: the gate of model.layers.0.self_attn.q_proj could not be solved for: linalg.eigh: the algo" in talk
    assert "raise gate.ridge" in talk and not (tmp_path / "stopped" / "run" / "gates.safetensors").exists()


def test_gates_of_b_stay_where_new_ones_cannot_be_solved_for_and_end_the_run_in_the_end(
    demanding: list[object], tmp_path: Path, monkeypatch, capfd
) -> None:
    # B's problems are 4 x 4, solved in two stacks at steps 1, 2, 3 ... of which the first two succeed.
    every_step = [*demanding, "gate.refresh_every=1", "evaluation.steps=1", "training.save_steps=1"]
    with monkeypatch.context() as patch:
        calls = failing(patch, lambda call: False, shape=(4, 4))
        assert run(*every_step, f"training.output_dir={tmp_path / 'straight'}") == 0
    each = calls[0] // 7
    with monkeypatch.context() as patch:
        failing(patch, lambda call: call == 2 * each + 1, shape=(4, 4))
        assert run(*every_step, "--overwrite") == 0
    assert "could not be solved for" not in capfd.readouterr().err, "a second try is made first"
    with monkeypatch.context() as patch:
        failing(patch, lambda call: call > 2 * each, shape=(4, 4))
        assert run(*every_step, "--overwrite") == 1
    talk = capfd.readouterr().err
    told = "step {}: the gates of B could not be solved for, and the last ones stay ({} in a row, the run ends at 3)"
    assert all(told.format(step, count) in talk for step, count in ((3, 1), (4, 2), (5, 3)))
    assert "error: the gates of B could not be solved for 3 times in a row: linalg.eigh: the algorithm" in talk
    folder = tmp_path / "stopped" / "run"
    assert max(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")) == 4
    capfd.readouterr()
    assert run(*every_step, "--resume") == 0, "it goes on where the solver has recovered"
    assert [line["step"] for line in metrics(folder) if "loss" in line][-1] >= 6


def trained(recipe: object, gate_lambda: float | None = 4.0) -> tuple[list[torch.Tensor], list[float]]:
    """Weights, and the loss of every step."""
    trainer = trainer_of(recipe, gate_lambda=gate_lambda)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return [p.detach().clone() for pair in adapter_pairs(trainer.model) for p in (pair.a, pair.b)], losses


# Of the loss of a step, and of their mean, by sums in another order in float32. Found: 9e-8 and 2e-9.
BATCH_TOLERANCE, MEAN_TOLERANCE = 1e-6, 1e-7
STEPS = ["logging.logging_steps=1", "training.max_steps=20"]


@pytest.mark.parametrize("rule", ["step", "frozen"])
def test_a_step_of_eight_rows_is_the_same_in_one_pass_in_two_and_in_eight(recipe_file: Path, rule: str) -> None:
    def losses_of(rows: int) -> list[float]:
        cut = [f"training.per_device_train_batch_size={rows}", f"training.gradient_accumulation_steps={8 // rows}"]
        return trained(load_recipe(recipe_file, [*STEPS, *cut, f"gate.rule={rule}"]))[1]

    losses = losses_of(8)
    for rows in (4, 1):
        relative = [(other - loss) / loss for loss, other in zip(losses, losses_of(rows), strict=True)]
        assert len(losses) == 20 and max(map(abs, relative)) < BATCH_TOLERANCE
        assert abs(sum(relative)) / 20 < MEAN_TOLERANCE


def test_activations_computed_again_change_no_bit(recipe_file: Path) -> None:
    kept = trained(load_recipe(recipe_file, [*STEPS, "training.activation_checkpointing=false"]))
    again = trained(load_recipe(recipe_file, [*STEPS, "training.activation_checkpointing=true"]))
    assert kept[1] == again[1]
    assert all(torch.equal(one, other) for one, other in zip(kept[0], again[0], strict=True))


def test_a_run_with_gates_of_ones_is_plain_qlora_bit_for_bit(demanding: list[object], tmp_path: Path) -> None:
    plain, ones = tmp_path / "plain", tmp_path / "ones"
    assert run(*demanding, "gate.enabled=false", f"training.output_dir={plain}") == 0
    assert run(*demanding, "gate.gate_lambda=0", f"training.output_dir={ones}") == 0
    values = [value for gate in json.loads((ones / "gates.json").read_text()) for value in gate["values"]]
    assert set(values) == {1.0}
    for name in ("gates.json", "gates.safetensors", "evaluation.json"):  # which only a gated run has, or says more in
        (ones / name).unlink()
    (plain / "evaluation.json").unlink()
    assert_the_same_run(plain, ones)
