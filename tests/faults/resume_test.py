"""A run that was stopped goes on as if it had not been: bit for bit on a CPU."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from folora_q.calibration.gate_store import load_gates
from folora_q.models.hardware import Hardware
from folora_q.runs.folder import RunFolder
from folora_q.training.fault_tolerant_trainer import FaultTolerantTrainer
from folora_q.workflows import calibration, prepare_training, training_run
from folora_q.workflows.training_run import TrainingRun
from tests.faults.commands import assert_the_same_run, at_step, manifest, metrics, run, signalled, steps_saved


@pytest.mark.parametrize("step", [1, 3, 6])
def test_an_interrupted_run_goes_on_bit_for_bit(
    demanding: list[object], tmp_path: Path, straight: Path, step: int, monkeypatch, capfd
) -> None:
    folder = tmp_path / "stopped" / "run"
    with monkeypatch.context() as patch:
        at_step(patch, step, signalled(signal.SIGINT))
        assert run(*demanding) == 130
    assert manifest(folder)["status"] == "interrupted"
    assert max(steps_saved(folder)) == step
    assert f"training.output_dir={folder} --resume\n" in capfd.readouterr().err
    assert run(*demanding, "--resume") == 0
    assert f"resuming from checkpoint-{step}\n" in capfd.readouterr().err
    assert [entry["step"] for entry in manifest(folder)["resumed"]] == [step]
    assert_the_same_run(straight, folder)


def test_a_frozen_a_is_saved_kept_and_gone_on_from(recipe_file: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    frozen = [recipe_file, "gate.rule=frozen", "training.save_steps=2"]
    straight, stopped = tmp_path / "straight" / "run", tmp_path / "stopped" / "run"
    assert run(*frozen, f"training.output_dir={straight}") == 0
    assert "frozen at a_start, b_step" in (straight / "adapter" / "README.md").read_text("utf-8")
    gates = load_gates(straight / "gates.safetensors")
    weights = load_file(straight / "adapter" / "adapter_model.safetensors")
    for layer, gate in gates.items():
        a = weights[f"base_model.model.{layer}.lora_A.weight"]
        rows = gate.gated_rows(len(a))
        assert torch.allclose(a / a.norm(), rows / rows.norm(), atol=1e-4)
        assert weights[f"base_model.model.{layer}.lora_B.weight"].norm() > 0
    newest = straight / f"checkpoint-{max(steps_saved(straight))}"
    state = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(gates), "Adam's moments are of the B's alone"
    stop_at(monkeypatch, 3, [*frozen, f"training.output_dir={stopped}"])
    assert run(*frozen, f"training.output_dir={stopped}", "--resume") == 0
    assert_the_same_run(straight, stopped)
    assert run(recipe_file, "gate.rule=frozen", "gate.places=[a_step]") == 2
    assert "rule frozen does not train A" in capfd.readouterr().err


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, arguments: list[object]) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, step, signalled(signal.SIGINT))
        assert run(*arguments) == 130


@pytest.mark.parametrize("interfere", ["flip", "lose the manifest"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    saving: list[object], finished: Path, tmp_path: Path, interfere: str, monkeypatch, capfd
) -> None:
    stop_at(monkeypatch, 5, saving)
    folder = tmp_path / "stopped" / "run"
    assert steps_saved(folder) == [2, 4, 5]
    newest = folder / "checkpoint-5"
    weights = newest / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    if interfere == "flip":
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
        named = "adapter_model.safetensors has the SHA-256 "
    else:
        (newest / "manifest.json").unlink()
        named = "it has no manifest.json, so it was never finished"
    capfd.readouterr()
    assert run(*saving, "--resume") == 0
    talk = capfd.readouterr().err
    assert f"checkpoint-5 is not used: {named}" in talk and "resuming from checkpoint-4\n" in talk
    assert_the_same_run(finished, folder)


def test_without_a_whole_checkpoint_training_begins_again_and_the_gates_are_taken(
    demanding: list[object], tmp_path: Path, straight: Path, monkeypatch, capfd
) -> None:
    folder = tmp_path / "stopped" / "run"
    stop_at(monkeypatch, 3, demanding)
    for manifest_file in folder.glob("checkpoint-*/manifest.json"):
        manifest_file.unlink()
    (tmp_path / "cache" / "proxy").rename(tmp_path / "gone")  # the folder's own text must do
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "build_gates", lambda *a: pytest.fail("the gates are there"))
        assert run(*demanding, "--resume") == 0
    talk = capfd.readouterr().err
    assert "there is no complete checkpoint: training starts again" in talk and "sampling text" not in talk
    assert_the_same_run(straight, folder)


def test_damaged_text_and_gates_are_made_again(
    demanding: list[object], tmp_path: Path, straight: Path, monkeypatch
) -> None:
    folder = tmp_path / "stopped" / "run"
    stop_at(monkeypatch, 3, demanding)
    gates = folder / "gates.safetensors"
    data = bytearray(gates.read_bytes())
    data[-1] ^= 1
    gates.write_bytes(data)
    (folder / "proxy.jsonl").write_text("{}")
    assert run(*demanding, "--resume") == 0
    assert_the_same_run(straight, folder)


def test_gates_that_come_out_otherwise_than_the_checkpoints_are_refused(
    demanding: list[object], tmp_path: Path, straight: Path, monkeypatch, capfd
) -> None:
    folder = tmp_path / "stopped" / "run"
    stop_at(monkeypatch, 3, demanding)
    (folder / "gates.safetensors").write_bytes(b"")
    made = calibration.build_gates

    def otherwise(model, proxy, task, settings, *rest):
        stronger = settings.gate.model_copy(update={"gate_lambda": 2.0})
        return made(model, proxy, task, replace(settings, gate=stronger), *rest)

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "build_gates", otherwise)
        for _ in range(2):  # the refusal itself must not make them the run's gates
            assert run(*demanding, "--resume") == 1
            talk = capfd.readouterr().err
            assert "gates.safetensors was damaged, and recomputing the gates gave different ones" in talk
            assert "--force" in talk
    assert max(steps_saved(folder)) == 3, "no step was taken with them"
    assert run(*demanding, "--resume") == 0
    assert_the_same_run(straight, folder)


def test_a_damaged_best_checkpoint_is_not_what_a_run_ends_with(
    demanding: list[object], tmp_path: Path, straight: Path, monkeypatch, capfd
) -> None:
    folder, load, damaged = tmp_path / "stopped" / "run", FaultTolerantTrainer._load_best_model, []

    def spoiled(self: FaultTolerantTrainer) -> None:
        weights = Path(self.state.best_model_checkpoint) / "adapter_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        damaged.append(weights.parent.name)
        load(self)

    with monkeypatch.context() as patch:
        patch.setattr(FaultTolerantTrainer, "_load_best_model", spoiled)
        assert run(*demanding) == 1
    talk = capfd.readouterr().err
    assert f"the best checkpoint, {damaged[0]}, is incomplete: adapter_model.safetensors has the SHA-256 " in talk
    assert manifest(folder)["status"] == "failed" and not (folder / "adapter").exists()
    assert run(*demanding, "--resume") == 0
    assert f"{damaged[0]} is not used: " in capfd.readouterr().err
    assert_the_same_run(straight, folder)


def test_a_finished_run_has_nothing_to_go_on_with(saving: list[object], tmp_path: Path, capfd) -> None:
    assert run(*saving, "training.max_steps=1", "--resume") == 2
    assert f"there is no run to resume in {tmp_path / 'stopped' / 'run'}" in capfd.readouterr().err
    assert not (tmp_path / "stopped" / "run").exists()
    assert run(*saving, "training.max_steps=1") == 0
    capfd.readouterr()
    before = (tmp_path / "stopped" / "run" / "run.json").read_bytes()
    assert run(*saving, "training.max_steps=1", "--resume") == 2
    assert "is complete: there is nothing to resume" in capfd.readouterr().err
    assert (tmp_path / "stopped" / "run" / "run.json").read_bytes() == before
    assert run(*saving, "--resume", "--overwrite") == 2
    assert run(*saving, "--force") == 2


def test_what_changed_since_is_listed_and_needs_force(saving: list[object], tmp_path: Path, monkeypatch, capfd) -> None:
    stop_at(monkeypatch, 3, saving)
    folder = tmp_path / "stopped" / "run"
    rows = tmp_path / "heldout.jsonl"
    rows.write_text(rows.read_text().replace("it is 21", "it was 21"))
    found = manifest(folder)
    found["versions"]["peft"] = "0.1"
    found["model"]["fingerprint"] = "0" * 64
    RunFolder(folder).write_manifest(found)
    before = (folder / "run.json").read_bytes()
    longer = [*saving, "training.max_steps=8", "--resume"]
    capfd.readouterr()
    assert run(*longer) == 2
    talk = capfd.readouterr().err
    changes = ["training.max_steps: 6 → 8", f"data file {rows}: SHA-256 ", "version of peft: 0.1 → "]
    assert all(change in talk for change in changes) and "--force" in talk
    assert (folder / "run.json").read_bytes() == before, "a refusal changes nothing"
    assert run(*longer, "--force") == 0
    [entry] = manifest(folder)["resumed"]
    assert entry["step"] == 3 and len(entry["forced"]) == 4
    assert entry["forced"][3].startswith("model fingerprint: 000000000000… → ")
    assert [line["step"] for line in metrics(folder) if "loss" in line] == list(range(1, 9))


def test_gates_are_made_again_for_another_strength(demanding: list[object], tmp_path: Path, monkeypatch) -> None:
    stop_at(monkeypatch, 3, demanding)
    folder = tmp_path / "stopped" / "run"
    other = [*demanding, "gate.gate_lambda=4", "--resume"]
    with monkeypatch.context() as patch:  # stopped before they are made, the old ones must not pass for them later
        patch.setattr(TrainingRun, "calibrate", lambda *a: signalled(signal.SIGINT)())
        assert run(*other, "--force") == 130
    assert run(*other) == 0
    assert {gate["gate_lambda"] for gate in json.loads((folder / "gates.json").read_text())} == {4.0}
    assert len(manifest(folder)["resumed"]) == 2


def test_another_model_is_refused_once_it_is_loaded(saving: list[object], tmp_path: Path, monkeypatch, capfd) -> None:
    stop_at(monkeypatch, 3, saving)
    folder = tmp_path / "stopped" / "run"
    found = manifest(folder)
    found["model"]["fingerprint"] = "0" * 64
    RunFolder(folder).write_manifest(found)
    for _ in range(2):  # the refusal itself must not make it the run's model
        assert run(*saving, "--resume") == 2
        assert "model fingerprint: 000000000000… → " in capfd.readouterr().err
    assert steps_saved(folder) == [2, 3]


def test_another_dtype_or_device_is_a_change_and_more_threads_are_a_note(
    saving: list[object], tmp_path: Path, monkeypatch, capfd
) -> None:
    with monkeypatch.context() as patch:
        other = Hardware(torch.device("cpu"), torch.bfloat16, "a CPU with bfloat16")
        patch.setattr(prepare_training, "choose_hardware", lambda dtype: other)
        stop_at(patch, 3, saving)
    folder = tmp_path / "stopped" / "run"
    assert run(*saving, "--resume") == 2
    assert "hardware dtype: bfloat16 → float32" in capfd.readouterr().err
    found = manifest(folder)
    found["computing"] |= {"device": "cuda", "threads": 64}
    RunFolder(folder).write_manifest(found)
    assert run(*saving, "--resume", "--force") == 2, "optim: auto is another optimizer there"
    assert f"no checkpoint of {folder} fits hardware device: cuda → cpu" in capfd.readouterr().err
    found["computing"]["device"], here = "cpu", torch.get_num_threads()
    RunFolder(folder).write_manifest(found)
    assert run(*saving, "--resume", "--force") == 0
    assert f"hardware threads: 64 → {here}; sums may be rounded differently" in capfd.readouterr().err
    [entry] = manifest(folder)["resumed"]
    assert entry["forced"] == ["hardware dtype: bfloat16 → float32"]
    facts = {"device": "cpu", "dtype": "float32", "name": "CPU", "threads": here, "processes": 1}
    assert manifest(folder)["computing"] == facts


def test_weights_of_other_shapes_are_refused_in_spite_of_force(saving: list[object], monkeypatch, capfd) -> None:
    stop_at(monkeypatch, 3, saving)
    assert run(*saving, "adapter.r=2", "--resume", "--force") == 2
    assert "fits adapter.r: 4 → 2" in capfd.readouterr().err


@pytest.mark.parametrize("save_steps", [2, "null"])
def test_the_last_step_is_not_taken_twice(
    saving: list[object], finished: Path, tmp_path: Path, save_steps: object, monkeypatch, capfd
) -> None:
    folder, saving = tmp_path / "stopped" / "run", [*saving, f"training.save_steps={save_steps}"]
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "evaluate", lambda *a: signalled(signal.SIGINT)())
        assert run(*saving) == 130
    assert max(steps_saved(folder)) == 6
    with monkeypatch.context() as patch:
        patch.setattr(FaultTolerantTrainer, "training_step", lambda *a: pytest.fail("there is no step left"))
        patch.setattr(FaultTolerantTrainer, "rehearse", lambda self: None)
        assert run(*saving, "--resume") == 0
    assert "resuming from checkpoint-6" in capfd.readouterr().err
    assert_the_same_run(finished, folder)
    kept = [2, 4, 6] if save_steps == 2 else []
    assert steps_saved(folder) == kept, "a checkpoint that was not asked for is gone once the run is complete"


def test_a_run_that_stopped_for_its_limit_stays_stopped(recipe_file: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    quick = ["evaluation.metric=none", "gate.enabled=false", "evaluation.steps=1", "training.max_steps=6"]
    quick += ["training.learning_rate=1e-2", "training.warmup_steps=0", "training.lr_scheduler_type=constant"]
    assert run(recipe_file, *quick, f"training.output_dir={tmp_path / 'free'}") == 0
    kls = [line["eval_kl"] for line in metrics(tmp_path / "free") if "eval_kl" in line]
    arguments = [recipe_file, *quick, f"evaluation.max_kl={(kls[2] + kls[3]) / 2}"]
    assert run(*arguments, f"training.output_dir={tmp_path / 'straight' / 'run'}") == 0
    arguments.append(f"training.output_dir={tmp_path / 'stopped' / 'run'}")
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "evaluate", lambda *a: signalled(signal.SIGINT)())
        assert run(*arguments) == 130
    capfd.readouterr()
    assert run(*arguments, "--resume") == 0
    assert f"stopped at step 3: KL {kls[3]:.4f}" in capfd.readouterr().err
    assert_the_same_run(tmp_path / "straight" / "run", tmp_path / "stopped" / "run")


def test_a_moved_folder_goes_on_with_its_best(
    demanding: list[object], tmp_path: Path, straight: Path, monkeypatch
) -> None:
    stop_at(monkeypatch, 5, demanding)
    then = tmp_path / "moved" / "run"
    then.parent.mkdir()
    (tmp_path / "stopped" / "run").rename(then)
    assert run(*demanding, f"training.output_dir={then}", "--resume") == 0
    assert_the_same_run(straight, then)
    state = json.loads((then / "checkpoint-7" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(then / f"checkpoint-{state['best_global_step']}")
