"""Targets for a run's files: numbers, text, gates, checkpoints, lock, as `report`, `inspect` and `train` read them."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from tests.conftest import write_recipe
from tests.fuzz.basics import CHECKPOINT, STEP, command, kept, named, tiny
from tests.fuzz.contract import Target


def build_gates(folder: Path) -> None:
    from folora_q.calibration.gate_store import save_gates
    from tests.conftest import random_gate

    shared = random_gate(16)
    save_gates(folder / "gates.safetensors", {"a.q_proj": shared, "a.k_proj": shared, "b.up_proj": random_gate(24)})


def read_gates(folder: Path, file: str) -> None:
    """Read and apply gates, as `eval` and a resumed run do."""
    import torch

    from folora_q.calibration.gate_store import gate_results, load_gates

    gates = load_gates(folder / file)
    gate_results(gates)
    for gate in gates.values():
        rows = torch.ones(2, gate.basis.shape[0])
        gate.apply(rows)
        gate.penalty(rows)


def build_samples(folder: Path) -> None:
    lines = [{"source": "bos", "text": "a b", "ids": [1, 2, 3]}, {"source": "chat", "text": "c", "ids": [4, 5]}]
    (folder / "proxy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_samples(folder: Path, file: str) -> None:
    """Read sampled text as `train`, `eval` and `merge` do; None means that it is sampled again."""
    from folora_q.calibration.sample_cache import read_samples

    for sample in read_samples(folder / file, 10) or []:
        if not sample.ids or not all(type(token) is int and 0 <= token < 10 for token in sample.ids):
            raise AssertionError(f"no token ids: {sample.ids[:9]}")


def build_run(folder: Path) -> None:
    from tests.report.run_folder import Shape, write_run

    write_run(folder / "run", Shape(layers=1, steps=20, every=10, harness=True))
    write_run(folder / "other", Shape(layers=0, steps=20, every=None, seed=1))


def read_run(folder: Path, file: str) -> None:
    """Show a run as `inspect` does, and compute the numbers of `report` and `compare`."""
    from folora_q.report.comparison import at_ends, at_equal_loss, names_of, where, written
    from folora_q.report.page import samples
    from folora_q.report.run_record import load_run, same_base, same_data

    runs = [load_run(folder / "run"), load_run(folder / "other")]
    same_base(runs), same_data(runs), names_of(runs), samples(runs[0].answers)
    for row in at_ends(runs):
        assert row.best in (None, 0, 1)
        [written(None if found is None else found.value, row.form) for found in row.estimates]
    equal = at_equal_loss(runs)
    [where(reached) for reached in (equal.reached if equal else []) if reached is not None]
    if runs[0].gates:
        command("inspect", folder / "run")
        command("inspect", folder / "run", "--module", next(iter(runs[0].gates[0].modules), "a"))


def read_and_report(folder: Path, file: str) -> None:
    """Write the pages of `report` and `compare`."""
    command("report", folder / "run", "--baseline", folder / "other", "--output", folder / "page.html")
    command("compare", folder / "run", folder / "other", "--output", folder / "compare.html")


# Checkpoints


def recipe_of(folder: Path, steps: int) -> Any:
    from folora_q.recipe import load_recipe

    settings = [
        f"training.max_steps={steps}",
        f"training.save_steps={STEP}",
        "gate.enabled=false",
        "evaluation.steps=2",
    ]
    more = [
        "training.load_best_model_at_end=true",
        "evaluation.num_proxy_samples=1",
        f"training.output_dir={folder / 'run'}",
    ]
    return load_recipe(folder / "recipe.yaml", [*settings, *more])


def build_checkpoint(folder: Path) -> None:
    """Write a run of the tiny model with one checkpoint, made by training it."""
    from folora_q.calibration.gate_store import save_gates
    from folora_q.recipe.strict_yaml import dump_yaml
    from folora_q.runs.folder import RunFolder
    from tests.conftest import random_gate

    kept = _trained()
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    run = RunFolder(folder / "run")
    recipe = recipe_of(folder, STEP + 1)
    run.recipe.write_text(dump_yaml(recipe.model_dump(mode="json")), encoding="utf-8")
    for step in (0, 1, 2):
        run.append_metrics({"stage": "training", "step": step, "loss": 1.5 - step / 4, "eval_loss": 2.0})
    run.write_manifest(new_run() | {"status": "interrupted", "model": {"name": "tiny", "fingerprint": "f" * 64}})
    build_samples(run.path)
    save_gates(run.gates, {"a": random_gate(16)})
    for path in (run.proxy, run.gates):
        run.remember(json.loads(run.manifest.read_text(encoding="utf-8")), path)


def new_run() -> dict[str, Any]:
    """Return the content of run.json at the start of a run."""
    return {
        "status": "running",
        "started": "2026-11-24T20:14:03+00:00",
        "versions": {"torch": "2.13.0"},
        "computing": {"device": "cpu", "dtype": "float32", "name": "CPU", "threads": 2},
        "data_sha256": {"/a/train.jsonl": "9f2c" * 16},
    }


@cache
def _trained() -> Path:
    from tests.training.trainer_test import trainer_of

    place = kept("run")
    write_recipe(place, tiny())
    trainer_of(recipe_of(place, STEP + 1)).train()
    for checkpoint in (place / "run").glob("checkpoint-*"):
        if checkpoint.name != CHECKPOINT:
            shutil.rmtree(checkpoint)
    return place


def seal_again(folder: Path, file: str) -> None:
    """Update the manifest for a changed file, so that the file reaches the readers behind that check."""
    from folora_q.training.checkpoints import MANIFEST, seal

    checkpoint = folder / "run" / CHECKPOINT
    if CHECKPOINT in file and not file.endswith(MANIFEST):
        (checkpoint / MANIFEST).unlink()
        seal(checkpoint, STEP)


def read_checkpoint(folder: Path, file: str) -> None:
    """Choose a checkpoint as `train --resume` does, and write what it records in run.json."""
    from folora_q.runs.earlier import read_earlier
    from folora_q.runs.folder import RunFolder
    from folora_q.training.resume import Manifests, prepare_resume

    seal_again(folder, file)
    run, recipe = RunFolder(folder / "run"), recipe_of(folder, STEP + 1)
    earlier = read_earlier(run)
    if earlier is None:
        return
    resumed = prepare_resume(run, recipe, Manifests(earlier, new_run()), force=True, tell=lambda line: None)
    resumed.require_model("f" * 64)
    for path in (run.proxy, run.gates):
        resumed.keeps(path)
    run.write_manifest(resumed.manifest(new_run()))


def read_and_resume(folder: Path, file: str) -> None:
    """Resume from a checkpoint as `train --resume` does, for one step."""
    from folora_q.training.checkpoints import newest_whole
    from tests.training.trainer_test import trainer_of

    seal_again(folder, file)
    checkpoint = newest_whole(folder / "run", needs_best=True, tell=lambda line: None)
    trainer_of(recipe_of(folder, STEP + 1)).train(checkpoint)


def build_lock(folder: Path) -> None:
    import socket

    (folder / "run").mkdir()
    holder = {
        "pid": 4_194_305,
        "host": socket.gethostname(),
        "started": 1.5,
        "boot": None,
    }  # no process has this number
    (folder / "run" / ".lock").write_text(json.dumps(holder), encoding="utf-8")


def read_lock(folder: Path, file: str) -> None:
    """Take the lock as every run does."""
    from folora_q.runs.lock import locked

    with locked(folder / "run", tell=lambda line: None):
        pass


REPORTED = {
    **named("json", "run/run.json", "run/evaluation.json", "run/gates.json"),
    **named("jsonl", "run/metrics.jsonl", "run/answers.jsonl"),
    "run/recipe.resolved.yaml": "yaml",
}
CHOSEN = {
    **named("json", "run/run.json", *(f"run/{CHECKPOINT}/{name}.json" for name in ("manifest", "trainer_state"))),
    "run/metrics.jsonl": "jsonl",
    "run/recipe.resolved.yaml": "yaml",
}
STATE = {
    **named("json", *(f"run/{CHECKPOINT}/{name}.json" for name in ("trainer_state", "progress"))),
    **named("torch", *(f"run/{CHECKPOINT}/{name}" for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"))),
    f"run/{CHECKPOINT}/adapter_model.safetensors": "safetensors",
}
TARGETS = [
    Target("gates", build_gates, {"gates.safetensors": "safetensors"}, read_gates),
    Target("sampled text", build_samples, {"proxy.jsonl": "jsonl"}, read_samples),
    Target("lock", build_lock, {"run/.lock": "json"}, read_lock, writes=True),
    Target("run", build_run, REPORTED, read_run, rate=4),
    Target("run: pages", build_run, REPORTED, read_and_report, rate=200),
    Target("checkpoint", build_checkpoint, CHOSEN, read_checkpoint, rate=2, writes=True),
    Target("checkpoint: resume", build_checkpoint, STATE, read_and_resume, rate=50, writes=True),
]
