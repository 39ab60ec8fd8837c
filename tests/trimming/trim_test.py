"""An adapter is shrunk to a KL, most where it helps the task least; the result is an ordinary PEFT adapter."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.trim.__main__ import EARLIER, INTRUDERS, main
from folora_q.calibration.gate_store import load_gates
from folora_q.core.shrink import together
from folora_q.errors import UserError
from folora_q.evaluation.divergence import HeldOutText, compare
from folora_q.models.adapters import adapter_pairs
from folora_q.progress import StageTimer
from folora_q.recipe import load_recipe
from folora_q.runs.folder import RunFolder
from folora_q.runs.results import TextResult
from folora_q.targets.find import find_target
from folora_q.targets.load import Precision, load_target
from folora_q.trimming import points
from folora_q.trimming.paths import BY_QUOTIENTS, BY_SCALE, PATHS, Update
from folora_q.workflows.trim import TrimRequest, TrimRun, run_trim
from tests.cli.commands_test import run
from tests.conftest import Silent, write_recipe

MUCH = [
    *("training.max_steps=30", "training.learning_rate=0.02", "logging.logging_steps=5", "evaluation.steps=10"),
    "proxy.num_heldout_samples=8",
]


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a gated run and one of plain QLoRA that moved the model far."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FOLORA_Q_CACHE", str(folder / "cache"))
        recipe = write_recipe(folder, tiny_folder)
        assert run("train", recipe, *MUCH, f"training.output_dir={folder / 'gated'}") == 0
        assert (
            run(
                "train",
                recipe,
                *MUCH,
                "gate.enabled=false",
                "training.save_steps=15",
                f"training.output_dir={folder / 'plain'}",
            )
            == 0
        )
    return folder


@pytest.mark.parametrize("path", PATHS)
def test_a_share_of_the_penalty_is_left(runs: Path, path: str) -> None:
    model = load_target(find_target(str(runs / "gated"))).model
    assert isinstance(model, PeftModel)
    update = Update(model, load_gates(runs / "gated" / "gates.safetensors"))
    whole = {pair.name: (pair.a.clone(), pair.b.clone()) for pair in update.pairs}
    for share in (0.5, 0.01):
        with update.at(path, share):
            now = Update(model, load_gates(runs / "gated" / "gates.safetensors")).energies
            assert now.penalty == pytest.approx(share * update.energies.penalty, rel=0.02)
            assert all(torch.equal(pair.b, whole[pair.name][1]) for pair in update.pairs)
    assert all(torch.equal(pair.a, whole[pair.name][0]) for pair in adapter_pairs(model))


def test_directions_of_low_quotient_are_shrunk_most(runs: Path) -> None:
    model = load_target(find_target(str(runs / "gated"))).model
    assert isinstance(model, PeftModel)
    update = Update(model, load_gates(runs / "gated" / "gates.safetensors"))
    utility = {}
    for path in PATHS:
        with update.at(path, 0.2):
            utility[path] = sum(
                float(update.gates[pair.name].utility(pair.b.detach() @ pair.a.detach())) for pair in update.pairs
            )
    assert utility[BY_QUOTIENTS] > 1.05 * utility[BY_SCALE]
    assert together([update.energies]).penalty == update.energies.penalty


def test_the_benchmark_reduces_intruders_as_peft_does_and_measures_earlier_steps(runs: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(runs / "plain"), "--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0 and (tmp_path / "trade-off.png").is_file() and INTRUDERS not in PATHS
    points = {(each["path"], each["share"]): each for each in json.loads((tmp_path / "points.json").read_text())}
    whole, none_reduced = points[BY_SCALE, 1.0], points[INTRUDERS, 1.0]
    assert none_reduced["loss"] == pytest.approx(whole["loss"], rel=1e-3), "1 leaves the adapter as it is"
    assert none_reduced["kl"]["value"] == pytest.approx(whole["kl"]["value"], rel=1e-2)
    assert points[INTRUDERS, 0.0]["kl"]["value"] != pytest.approx(whole["kl"]["value"], rel=1e-2)
    assert points[EARLIER, 1.0]["kl"]["value"] == pytest.approx(whole["kl"]["value"], rel=1e-3)
    assert points[EARLIER, 0.5]["kl"]["value"] != pytest.approx(whole["kl"]["value"], rel=1e-2)


def test_a_run_is_trimmed_to_a_kl_and_merged(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The plain run has no statistics, so they are taken."""
    picture, output = tmp_path / "curve.png", tmp_path / "trimmed"
    before = json.loads((runs / "plain" / "evaluation.json").read_text())["texts"]
    kl = next(text["kl"]["value"] for text in before if text["name"] == "generated text")
    assert run("trim", runs / "plain", "--kl", kl / 4, "--curve", picture, "--output", output) == 0
    printed = capfd.readouterr().out
    assert "On the way to the base" in printed and picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads((output / "trim.json").read_text())
    assert 0 < report["chosen"]["share"] < 1
    assert report["chosen"]["kl"]["value"] < kl / 2
    points = {(point["path"], point["share"]): point for point in report["points"]}
    assert {path for path, _ in points} == set(PATHS)
    assert points[BY_QUOTIENTS, 1.0]["kl"]["value"] > points[BY_QUOTIENTS, 0.1]["kl"]["value"]
    assert run("merge", output, "--output", tmp_path / "merged", "--dtype", "float32") == 0
    assert "Is it the adapter? Yes" in capfd.readouterr().out


def test_the_trimmed_adapter_is_what_was_measured(runs: Path, tmp_path: Path) -> None:
    result = run_trim(TrimRequest(str(runs / "gated"), kl=1e-3, output=tmp_path / "trimmed"), Silent())
    assert result.folder is not None and result.chosen is not None and len(result.trajectory) > 1
    original, saved = (load_file(f / "adapter_model.safetensors") for f in (runs / "gated" / "adapter", result.folder))
    assert saved.keys() == original.keys()
    changed = {name for name, tensor in saved.items() if not torch.equal(tensor, original[name])}
    assert changed and all(".lora_A." in name for name in changed)
    base = find_target(str(runs / "gated")).section.model_name_or_path
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.folder)  # PEFT alone
    loaded = load_target(find_target(str(result.folder)), Precision("float32", 16)).model
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        moved = [model(input_ids=ids).logits for model in (plain, loaded)]
    assert float((moved[0] - moved[1]).abs().max()) < 1e-4
    with pytest.raises(UserError, match="already exists"):
        run_trim(TrimRequest(str(runs / "gated"), kl=1e-3, output=tmp_path / "trimmed"), Silent())


def test_an_adapter_alone_needs_a_task(runs: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "elsewhere"
    adapter.mkdir()
    for file in (runs / "plain" / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"no task to take them of") as caught:
        run_trim(TrimRequest(str(adapter), samples=8), Silent())
    assert re.search("--recipe", caught.value.hint or "")


def test_a_kl_that_cannot_be_reached_is_refused(runs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(points, "compare", above(0.0018))
    with pytest.raises(UserError, match=r"the KL is 0.0018 with hardly any of the update, more than --kl 0.001"):
        run_trim(TrimRequest(str(runs / "gated"), kl=1e-3, output=tmp_path / "trimmed"), Silent())
    assert not (tmp_path / "trimmed").exists()


def above(floor: float) -> Callable[..., TextResult]:
    """Return a comparison whose KL is larger by a constant, as rounding makes it."""

    def compared(*arguments: Any, **named: Any) -> TextResult:
        found = compare(*arguments, **named)
        return replace(found, kl=replace(found.kl, value=found.kl.value + floor))

    return compared


def test_what_a_second_task_added_is_trimmed(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The result is the sum of the first adapter and of less of the second, on the original base."""
    second = tmp_path / "second"
    adapter = f"model.adapter={runs / 'gated'}"
    assert run("train", runs / "recipe.yaml", *MUCH, adapter, f"training.output_dir={second}") == 0
    assert run("trim", second / "adapter") == 2
    assert f"folora-q trim {second}" in capfd.readouterr().err
    assert run("trim", second, "--kl", 1e-3) == 0
    assert f"folora-q merge {second / 'trimmed'}" in capfd.readouterr().out
    first, added, trimmed = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (runs / "gated" / "adapter", second / "added", second / "trimmed")
    )
    for name in (name for name in first if ".lora_A." in name):
        rank = len(first[name])
        assert len(trimmed[name]) == rank + len(added[name])
        assert torch.equal(trimmed[name][:rank], first[name])
        assert float(trimmed[name][rank:].norm()) < 0.9 * float(added[name].norm())
        assert float(trimmed[name][rank:].norm()) > 0
    assert run("eval", second / "trimmed", "--output", tmp_path / "eval") == 0


@pytest.mark.parametrize("held", ["few", "another recipe"])
def test_what_is_measured_on_was_held_out_by_the_run(runs: Path, tmp_path: Path, held: str, monkeypatch) -> None:
    """A recipe that is named divides no samples of a run; with fewer than needed, new ones are generated."""
    recipe = load_recipe(runs / "recipe.yaml", ["proxy.num_samples=1"] if held == "another recipe" else [])
    copy = tmp_path / "gated"
    shutil.copytree(runs / "gated", copy)
    lines = (copy / "proxy.jsonl").read_text().splitlines(keepends=True)
    own = RunFolder(copy).read_recipe().proxy
    if held == "few":
        lines = lines[: own.num_samples + 1]
        (copy / "proxy.jsonl").write_text("".join(lines))
    prepared = TrimRun(TrimRequest(str(copy), recipe=recipe, samples=8), StageTimer(Silent())).prepare()
    seen = {tuple(json.loads(line)["ids"]) for line in lines[: own.num_samples]}
    texts = [text for part in (prepared.measuring.chosen_on, prepared.measuring.reported_on) for text in rows_of(part)]
    assert len(texts) >= 8 and not seen & set(texts)


def rows_of(text: HeldOutText) -> list[tuple[int, ...]]:
    return [
        tuple(row[mask.bool()].tolist())
        for batch in text.batches
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def test_the_template_of_a_named_recipe_is_used(runs: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<<{{ m.role }}>>{{ m.content }}<|im_end|>{% endfor %}")
    recipe = load_recipe(runs / "recipe.yaml", [f"data.chat_template={template}"])
    request = TrimRequest(str(runs / "gated"), recipe=recipe)
    losses = [
        cast(Callable[[], float], TrimRun(each, StageTimer(Silent())).prepare().measuring.task)()
        for each in (request, TrimRequest(str(runs / "gated")))
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_what_is_no_adapter_is_refused(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("trim", tiny_folder) == 2
    assert "is not an adapter" in capfd.readouterr().err
