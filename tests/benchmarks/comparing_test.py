"""Curves at equal task loss, on runs whose trade-off is known."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.frontier.__main__ import HERE
from benchmarks.frontier.comparing import Curve, Spread, gain, wanted_loss
from benchmarks.frontier.methods.base import USUAL_RATE
from benchmarks.frontier.results import Cell, Key, Result, Setting, read_all, write
from benchmarks.frontier.tables import BEGIN, DEFAULT_RATE, END, at_equal_loss, ends, show
from folora_q.errors import UserError
from folora_q.recipe import load_recipe

STYLE = Setting("folder/model.gguf", "style", "as it is")
GENERAL = ("prose", "manual", "code")
CELL = Cell(STYLE, 3.0)
BASE = {
    "loss": {"task": 4.0, "own text": 1.0, "own text, cut": 1.0} | dict.fromkeys(GENERAL, 3.0),
    "exact": None,
    "accuracy": 0.4,
}


def point(loss: float, kl: float) -> dict:
    texts = {"task": loss, "own text": 1.0, "own text, cut": 1.0} | dict.fromkeys(GENERAL, 3.0 + kl)
    scores = {"exact": None, "accuracy": 0.35, "human_eval": None}
    return {"loss": texts, "kl": {"own text": kl, "own text, cut": kl}, "update_norm": 1.0} | scores


def run(series: str, points: Sequence[tuple[float, float]], seed: int = 0, rate: float = 1e-3) -> Result:
    """A run that was measured at these (task loss, KL)."""
    best = min(points)
    return Result(
        series=series,
        learning_rate=rate,
        task="style",
        seed=seed,
        steps=10 * len(points),
        base=BASE | {"human_eval": None},
        tuned=point(*best),
        preparing=0.0,
        seconds=2.0,
        best_step=10 * (1 + list(points).index(best)),
        path={10 * (number + 1): point(*each) for number, each in enumerate(points)},
    )


def power(series: str, factor: float, seed: int = 0) -> Result:
    """KL = factor / loss²: a straight line in logarithms, which is interpolated exactly."""
    return run(series, [(loss, factor / loss**2) for loss in (3.5, 2.0, 1.0)], seed)


def test_between_points_a_power_law_is_found_exactly() -> None:
    curve = Curve.of([power("LoRA", 0.5)])
    assert curve.at_task_loss(1.5, lambda r: r.kl, log=True) == pytest.approx(0.5 / 1.5**2)
    assert math.isnan(curve.at_task_loss(0.9, lambda r: r.kl, log=True))
    assert curve.at_task_loss(3.6, lambda r: r.kl, log=True) == pytest.approx(0.5 / 3.5**2)
    assert curve.ends_before(3.6) and not curve.ends_before(3.4)


def test_points_that_another_beats_are_no_part_of_a_curve() -> None:
    beaten, unstable = run("LoRA", [(2.0, 9.0), (1.9, 7.0)]), run("LoRA", [(math.nan, 0.0)])
    assert Curve.of([power("LoRA", 0.5), beaten, unstable]) == Curve.of([power("LoRA", 0.5)])


def test_a_gain_is_a_share_of_plain_loras_best() -> None:
    plain = [power("LoRA", 0.5), run("LoRA", [(2.5, 0.1), (3.0, 0.2)], rate=1e-4)]
    assert wanted_loss(plain, 0.8) == pytest.approx(4.0 - 0.8 * 3.0)
    assert gain(run("ours", [(2.5, 0.1)]), plain) == pytest.approx(0.5)
    assert gain(plain[0], plain) == 1.0 and gain(plain[1], plain) == pytest.approx(0.5)


def test_methods_are_compared_seed_by_seed_at_equal_loss() -> None:
    results = [each for seed in (0, 1) for each in (power("LoRA", 0.5, seed), power("half", 0.25 + 0.05 * seed, seed))]
    results += [run("weak", [(3.9, 0.01)]), run("strong", [(1.0, 0.02)]), power("another seed", 0.1, seed=7)]
    table = at_equal_loss(CELL, results)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == ["LoRA", "half", "weak", "strong"]
    loss = wanted_loss([power("LoRA", 0.5)], 0.9)
    assert rows["half"]["90%: KL / LoRA's"] == "0.550 (0.500–0.600)" and rows["half"]["seeds"] == "2"
    kl = Spread.of([0.25 / loss**2, 0.3 / loss**2])
    assert rows["half"]["90%: KL"] == f"{kl:.4f}" and rows["LoRA"]["90%: KL / LoRA's"] == "1.000 (1.000–1.000)"
    assert rows["strong"]["90%: KL"] == "≤ 0.0200", "it learned more at every point"
    assert rows["weak"]["90%: KL"] == rows["weak"]["99%: rise"] == "–" and rows["weak"]["best gain"] == "3.3%"


def test_each_run_has_a_row_at_its_lowest_loss() -> None:
    overfitted = run("LoRA", [(2.0, 0.1), (1.0, 0.2), (1.5, 0.4)])
    table = ends(CELL, [overfitted, run("OFT", [(3.0, 0.05)])])
    base, plain, other = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert base["task loss"] == "4.000" and base["questions"] == "0.400" and base["HumanEval"] == "–"
    assert plain["step"] == "20 of 30" and plain["gain"] == "100.0%" and plain["rise: prose"] == "+0.2000"
    assert other["gain"] == "33.3%" and other["questions"] == "0.350"
    assert table.markdown().count("\n|") == 1 + len(table.rows) + 1


def test_text_that_improved_counts_as_unchanged() -> None:
    assert run("LoRA", [(1.0, -0.2)]).mean_rise == 0.0


def test_a_run_is_found_again_by_its_settings_alone(tmp_path: Path) -> None:
    key = Key(STYLE, {"method": "LoRA", "learning_rate": 1e-3}, 0, 3.0)
    written = power("LoRA", 0.5)
    write(key.path(tmp_path), key, written)
    assert Key(STYLE, {"learning_rate": 1e-3, "method": "LoRA"}, 0, 3.0).path(tmp_path).exists()
    others = [replace(STYLE, model="other"), replace(STYLE, recipe="other")]
    for other in (*(replace(key, on=on) for on in others), replace(key, seed=1), replace(key, epochs=1.0)):
        assert not other.path(tmp_path).exists()
    _, found = read_all(tmp_path, tmp_path / "nothing.jsonl")
    assert list(found) == [CELL] and [r.along()[0].kl for r in found[CELL]] == [written.along()[0].kl]


def test_kept_runs_and_new_ones_are_read_once(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    for number in range(3):
        key = Key(STYLE, {"number": number}, 0, 3.0)
        write(key.path(tmp_path), key, power("LoRA", 0.5, seed=number))
    lines, found = read_all(tmp_path, kept)
    assert len(lines) == len(found[CELL]) == 3
    kept.write_text("".join(f"{line}\n" for line in lines.values()), encoding="utf-8")
    next(tmp_path.glob("*.json")).unlink()
    assert read_all(tmp_path, kept)[0].keys() == lines.keys()


def test_a_setting_is_all_that_a_recipe_says_and_the_same_in_another_clone(tmp_path: Path) -> None:
    shutil.copytree(HERE / "data", tmp_path / "data")
    shutil.copy(HERE / "style.yaml", tmp_path)

    def setting(folder: Path, *overrides: str) -> Setting:
        path = folder / "style.yaml"
        return Setting.of(path, load_recipe(path, overrides))

    assert setting(HERE) == setting(tmp_path) == setting(HERE, "training.output_dir=elsewhere")
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.gguf").write_bytes(b"GGUF")
    models = [setting(HERE, f"model.model_name_or_path={tmp_path / name}/model.gguf") for name in ("one", "other")]
    assert models[0] == models[1], "wherever the model lies"
    for override in "model.model_name_or_path=some/other", "gate.rank=8", "proxy.num_samples=8":
        assert setting(HERE, override) != setting(HERE)


def test_the_pages_get_tables_and_plots_of_what_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "benchmarks" / "frontier" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    pages = {tmp_path / "docs" / "frontier.md": "summary", tmp_path / "README.md": "headline"}
    for page, part in pages.items():
        page.write_text(f"before\n{BEGIN.format(part)}\nold\n{END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr("benchmarks.frontier.tables.PICTURED", {(STYLE.task, STYLE.model)})
    usual, other = replace(power("LoRA", 0.5), learning_rate=USUAL_RATE), replace(CELL, on=replace(STYLE, task="skill"))
    found = {
        CELL: [usual, power("LoRA", 0.6), replace(power("ours", 0.1), learning_rate=DEFAULT_RATE)],
        other: [power("ours", 2.0)],
    }
    for _ in range(2):
        show(found, tmp_path)
        summary, readme = (page.read_text("utf-8") for page in pages)
        for text in (summary, readme):
            assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert summary.count("| **gated**, 2e-3 (default) | 100.0% | 0.1000 | +0.1000 |") == 1
        assert summary.count("plain QLoRA, 2e-4 (usual) | ") == 1 and "skill" not in summary
        assert readme.count("| 100 % → 100.0 % | 0.500 → **0.100** | ") == 1 and "skill" not in readme
        tables = (results / "tables.md").read_text("utf-8")
        assert tables.count("at its lowest held-out loss") == 2 and tables.count("at equal task loss") == 1
        assert "| ours | 1 | 100.0% | " in tables and "(style-model-3.png)" in tables
    for image in results / "style-model-3.png", tmp_path / "docs" / "images" / "frontier.png":
        assert image.read_bytes().startswith(b"\x89PNG")


def test_without_a_run_the_table_says_what_to_do() -> None:
    with pytest.raises(UserError, match="no results"):
        show({}, None)
