"""`folora-q report`, `compare` and `inspect` as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import folora_q
from folora_q.cli.app import main
from folora_q.runs.result_files import read_gate_results, to_json
from tests.report.run_folder import Shape, gates, write_run

# Without layers, figures are few and fast.
QUICK = Shape(layers=0)
PLAIN = Shape(layers=0, gated=False, final_loss=0.11, kl_scale=0.3)
ATTACK = "\x1b[31m[bold]x[/]\x07"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "demo", QUICK)
    return Path("demo")


# report


def test_the_report_lies_in_the_run_and_says_where(demo: Path, capfd) -> None:
    assert run("report", demo) == 0
    text, talk = capfd.readouterr()
    assert (demo / "report.html").read_text("utf-8").startswith("<!doctype html>")
    figures = {"course.png", "trade-off.png", "costs.png"}
    assert {path.name for path in (demo / "figures").iterdir()} == figures
    link = (demo / "report.html").resolve().as_uri()
    assert text == f"3 figures in demo/figures\ndemo/report.html\n{link}\n"
    assert "drawing the report" in talk and "compared with" not in talk
    assert run("report", demo, "--output", "there/page.html") == 0
    assert Path("there/page.html").read_bytes() == (demo / "report.html").read_bytes()
    assert {path.name for path in Path("there/page-figures").iterdir()} == figures


def test_the_plain_run_that_train_proposes_is_the_usual_baseline(demo: Path, tmp_path: Path, capfd) -> None:
    write_run(tmp_path / "demo-plain", PLAIN)
    assert run("report", demo) == 0
    assert "compared with demo-plain, plain QLoRA" in capfd.readouterr().err
    assert "Compared with demo-plain" in (demo / "report.html").read_text("utf-8")
    write_run(tmp_path / "demo-plain", replace(PLAIN, fingerprint="another"))
    assert run("report", demo) == 0
    write_run(tmp_path / "demo-plain", PLAIN).evaluation.unlink()
    assert run("report", demo) == 0
    assert "compared with" not in capfd.readouterr().err


def test_a_baseline_can_be_named_and_must_fit(demo: Path, tmp_path: Path, capfd) -> None:
    write_run(tmp_path / "slow", PLAIN)
    write_run(tmp_path / "other", replace(PLAIN, fingerprint="another"))
    assert run("report", demo, "--baseline", "slow") == 0
    assert "Compared with slow" in (demo / "report.html").read_text("utf-8")
    for name, message in (
        ("other", "other was trained on another base model than demo"),
        ("demo", "the baseline is the run itself"),
        ("gone", "there is no run in gone"),
    ):
        assert run("report", demo, "--baseline", name) == 2
        assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("dmeo", "there is no run in dmeo: no such folder", "did you mean demo?"),
        (".", "there is no run in .: it holds no run.json", "did you mean demo?"),
        ("demo/run.json", "demo/run.json is a file", "name the run's folder"),
        ("x" * 5000, "there is no run in", ""),
        ("zzz", "there is no run in zzz", "training.output_dir"),
    ],
)
def test_no_run_there_is_answered_with_near_ones(name: str, message: str, hint: str, demo: Path, capfd) -> None:
    for command in ("report", "inspect"):
        assert run(command, name) == 2
        talk = capfd.readouterr().err
        assert talk.startswith("error: ") and message in talk and hint in talk


def test_a_page_replaces_pages_only(demo: Path, capfd) -> None:
    Path("notes.html").write_text("mine")
    Path("folder").mkdir()
    assert run("report", demo, "--output", "notes.html") == 2
    assert "notes.html already exists and is not a folora-q page" in capfd.readouterr().err
    assert run("compare", demo, write_run(Path("two"), PLAIN).path, "--output", "folder") == 2
    assert "folder is a folder" in capfd.readouterr().err
    assert run("report", demo, "--output", "notes.html/page.html") == 2
    assert "cannot write notes.html/page.html" in capfd.readouterr().err
    assert Path("notes.html").read_text() == "mine" and not (demo / "figures").exists()


def test_an_unfinished_run_has_a_report(demo: Path, capfd) -> None:
    (demo / "evaluation.json").unlink()
    (demo / "run.json").write_text('{"status": "interrupted"}')
    assert run("report", demo) == 0
    assert "it is marked as interrupted" in (demo / "report.html").read_text("utf-8")


# compare


def test_runs_are_compared_at_their_ends_and_at_equal_loss(demo: Path, tmp_path: Path, capfd) -> None:
    write_run(tmp_path / "slow", PLAIN)
    write_run(tmp_path / "bare", replace(QUICK, every=None, final_loss=0.08))
    assert run("compare", "demo", "slow", "bare") == 0
    text, talk = capfd.readouterr()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert ["task: loss", "2.8330", "0.0430", "0.1100", "0.0800"] in rows
    assert ["generated text: KL", "0.0000", "0.1250", "0.3000", "0.1250"] in rows
    assert "At task loss 0.1100, the lowest that all of them reached" in text
    demo_row = next(row for row in rows if row[0] == "demo")
    assert 0.07 < float(demo_row[1]) < 0.1125 and demo_row[3].startswith("interpolated")
    assert next(row for row in rows if row[0] == "slow")[1:] == ["0.2700", "68.5%", "measured at step 200"]
    assert next(row for row in rows if row[0] == "bare")[1:] == ["–", "–", "not measured there"]
    assert "train with evaluation.steps set" in text and "note" not in talk
    page = Path("compare.html").read_text("utf-8")
    assert "interpolated" in page and Path("compare.html").resolve().as_uri() in text


def test_what_cannot_be_compared_is_refused_and_what_is_not_known_is_said(demo: Path, tmp_path: Path, capfd) -> None:
    write_run(
        tmp_path / "other", replace(PLAIN, fingerprint="another"), model={"name": "x/y", "fingerprint": "another"}
    )
    assert run("compare", demo, "other") == 2
    talk = " ".join(capfd.readouterr().err.split())
    assert "trained on different base models" in talk and "other: x/y" in talk
    assert not Path("compare.html").exists()
    for arguments, message in (
        ((), "name two runs or more"),
        ((demo,), "name two runs"),
        ((demo, demo), "named twice"),
    ):
        assert run("compare", *arguments) == 2
        assert message in capfd.readouterr().err
    write_run(tmp_path / "old", PLAIN, model=None, data_sha256={"train.jsonl": "0"})
    assert run("compare", demo, "old") == 0
    talk = capfd.readouterr().err
    assert "so it is unknown whether it is the same" in talk and "these runs had different data" in talk
    (tmp_path / "old" / "evaluation.json").unlink()
    (tmp_path / "old" / "metrics.jsonl").unlink()
    assert run("compare", demo, "old") == 0
    text, talk = capfd.readouterr()
    assert "old has no evaluation" in talk and "There is no task loss at which the runs can be compared" in text


# inspect


def test_inspect_shows_every_layer_and_the_sums(tmp_path: Path, capfd) -> None:
    shape = Shape(layers=3)
    write_run(tmp_path / "demo", shape)
    assert run("inspect", tmp_path / "demo") == 0
    text = capfd.readouterr().out
    found = gates(shape)
    assert "demo: where the gate bites (λ = 16)" in text
    for title in (
        "Top quotient γ",
        "Mean gate value",
        "Energy kept of A’s",
        "Energy kept of B’s",
        "Drift on task text",
    ):
        assert title in text
    assert "12 gates for 21 layers; q/k/v_proj and gate/up_proj share one, as they read one input" in text
    over = sum(value > 0.5 for gate in found for value in gate.values)
    directions = sum(gate.dim for gate in found)
    mean = sum(gate.mean_value * gate.dim for gate in found) / directions
    assert f"{over} of {directions:,} directions ({over / directions:.1%}) pass more than half" in text
    assert f"the mean share is {mean:.1%}" in text
    row = next(line for line in text.splitlines() if line.startswith("q/k/v_proj"))
    bars = row.removeprefix("q/k/v_proj")[3:6]
    assert len(bars) == 3 and set(bars) <= set("▁▂▃▄▅▆▇█")


def test_inspect_shows_one_gate_in_detail(tmp_path: Path, capfd) -> None:
    write_run(tmp_path / "demo", Shape(layers=3))
    gate = read_gate_results(tmp_path / "demo" / "gates.json")[7]
    assert run("inspect", tmp_path / "demo", "--module", "1.mlp.down_proj") == 0
    text = capfd.readouterr().out
    assert "model.layers.1.mlp.down_proj" in text and "width 1,536; 110 directions resolved; λ = 16" in text
    lines = [line.split() for line in text.splitlines()]
    assert [line[2] for line in lines if line[:1] == ["1"]] == [f"{gate.values[0]:.1%}"]
    assert ["...", "82", "more:", "--all"] in lines and sum(
        line[:1] in (["24"], ["107"], ["25"]) for line in lines
    ) == 2
    assert any(line[:3] == ["the", "other", "1,426"] and line[4] == f"{gate.complement_value:.1%}" for line in lines)
    assert run("inspect", tmp_path / "demo", "--module", "1.mlp.down_proj", "--all") == 0
    assert sum(line.split()[:1] == ["25"] for line in capfd.readouterr().out.splitlines()) == 1
    assert run("inspect", tmp_path / "demo", "--module", "donw_proj") == 2
    assert "did you mean down_proj" in capfd.readouterr().err


def test_rows_in_shares_and_their_penalty_are_told(tmp_path: Path, capfd) -> None:
    folder = write_run(tmp_path / "demo", Shape(layers=2))
    recipe = yaml.safe_load(folder.recipe.read_text("utf-8"))
    recipe["gate"] |= {"rule": "frozen", "places": ["a_start", "b_step"]}
    folder.recipe.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    gates = [replace(gate, heldout_penalty=0.6) for gate in read_gate_results(folder.gate_results)]
    folder.gate_results.write_text(to_json([*gates[1:], replace(gates[0], penalty=None)]), encoding="utf-8")
    assert run("inspect", folder.path) == 0
    text = capfd.readouterr().out
    assert "and stays there; of Adam's steps each direction gets a share of √γ" in text
    assert "on held-out model-generated text: 1.2 times the in-sample penalty\n" in text


def test_where_a_is_frozen_no_share_of_a_step_is_told(tmp_path: Path, capfd) -> None:
    folder = write_run(tmp_path / "demo", Shape(layers=3))
    recipe = folder.recipe.read_text("utf-8")
    folder.recipe.write_text(recipe.replace("rule: step", "rule: frozen"), encoding="utf-8")
    assert run("inspect", folder.path) == 0
    text = capfd.readouterr().out
    assert "demo: where the gate bites (A frozen)" in text and "Top quotient γ" in text
    assert "A reads the 16 directions of largest γ of each, and stays there: no step passes a gate" in text
    assert "on held-out model-generated text: 3.5 times the in-sample penalty; raise proxy.num_samples" in text
    assert "Mean gate value" not in text and "pass more than half" not in text and "λ" not in text
    assert run("inspect", folder.path, "--module", "1.mlp.down_proj") == 0
    text = capfd.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    told = {line[0]: line[2] for line in lines if len(line) == 3 and line[0].isdigit()}
    assert told["1"] == told["16"] == "yes" and told["17"] == told["110"] == "no"
    assert ["the", "other", "1,426"] in [line[:3] for line in lines] and "%" not in text.partition("drift")[0]
    assert run("report", folder.path) == 0
    page = (folder.path / "report.html").read_text("utf-8")
    assert "A’s rows are frozen to the first 16" in page and "A reads the first 16 directions, shaded." in page
    assert "share that passes" not in page and "pass more than half" not in page


def test_inspect_of_a_run_without_gates_is_a_sentence(demo: Path, tmp_path: Path, capfd) -> None:
    write_run(tmp_path / "plain", PLAIN)
    assert run("inspect", "plain") == 2
    assert "error: plain is plain QLoRA: it has no gates" in capfd.readouterr().err
    (demo / "gates.json").unlink()
    assert run("inspect", demo) == 2
    assert "demo has no gates in gates.json; the run is marked as complete" in capfd.readouterr().err


def test_what_stands_in_the_files_does_not_steer_the_terminal(tmp_path: Path, capfd) -> None:
    shape = Shape(layers=1)
    folder = write_run(tmp_path / "run", shape, status=ATTACK, model={"name": ATTACK})
    found = [replace(gate, modules=[f"{ATTACK}.0.{ATTACK}{n}"]) for n, gate in enumerate(gates(shape))]
    folder.gate_results.write_text(to_json(found), encoding="utf-8")
    evaluation = json.loads(folder.evaluation.read_text("utf-8"))
    for n, entry in enumerate([*evaluation["texts"], *evaluation["layers"]]):
        entry["name"] = f"{ATTACK}{n}"
    folder.evaluation.write_text(json.dumps(evaluation), encoding="utf-8")
    write_run(tmp_path / "other", QUICK, model={"name": ATTACK})
    assert run("inspect", folder.path) == 0
    assert run("inspect", folder.path, "--module", "*0") == 0
    assert run("compare", folder.path, tmp_path / "other", "--output", tmp_path / "x.html") == 0
    said = "".join(capfd.readouterr())
    assert "\x1b[31m" not in said and "\x07" not in said and "[bold]x[/]" in said


@pytest.mark.parametrize("command", ["inspect", "report"])
def test_no_torch_is_needed(command: str, demo: Path, tmp_path: Path) -> None:
    if command == "inspect":
        write_run(tmp_path / "demo", Shape(layers=1))
    heavy = {"torch", "transformers", "peft", "datasets"} | ({"matplotlib", "numpy"} if command == "inspect" else set())
    code = (
        f"import sys\nfrom folora_q.cli.app import main\n"
        f"try: main([{command!r}, 'demo'])\nexcept SystemExit as end: assert not end.code\n"
        f"found = {heavy} & set(sys.modules)\nassert not found, found"
    )
    house = str(Path(folora_q.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": house})
    assert done.returncode == 0, done.stderr
