"""Curves at equal task loss, on runs whose trade-off is known."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.frontier.__main__ import HERE
from benchmarks.frontier.changes import changes
from benchmarks.frontier.comparing import Curve, Spread, at_update_norm, kept_accuracy, wanted_loss
from benchmarks.frontier.costs import Beside, costs_path
from benchmarks.frontier.plot import look
from benchmarks.frontier.results import Key, Result, Setting, kept, read, write
from benchmarks.frontier.tables import BEGIN, COLUMNS, COST_COLUMNS, END, METHODS, markdown, rows, show
from folora_q.errors import UserError
from folora_q.recipe import load_recipe

STYLE = Setting("model", "style", "as it is")


def run(
    loss: float,
    kl: float,
    *,
    series: str = "LoRA",
    norm: float = 1.0,
    seed: int = 0,
    accuracy: float = 0.4,
    rate: float = 1e-3,
) -> Result:
    texts = {"task": loss, "own text": 1.0, "own text, cut": 1.0, "prose": 3.0 + kl}
    before = {"task": 4.0, "own text": 1.0, "own text, cut": 1.0, "prose": 3.0}
    return Result(
        series=series,
        learning_rate=rate,
        task="style",
        seed=seed,
        steps=100,
        base={"loss": before, "accuracy": 0.4},
        tuned={
            "loss": texts,
            "kl": {"own text": kl, "own text, cut": kl},
            "accuracy": accuracy,
            "exact": None,
            "update_norm": norm,
        },
        preparing=0.0,
        seconds=2.0,
        peak_bytes=100,
    )


def power(series: str, factor: float, seed: int = 0) -> list[Result]:
    """KL = factor / loss²: a straight line in logarithms, which is interpolated exactly."""
    return [
        run(loss, factor / loss**2, series=series, seed=seed, norm=1 / loss, rate=1e-3 / loss)
        for loss in (1.0, 2.0, 3.5)
    ]


def test_between_runs_a_power_law_is_found_exactly() -> None:
    curve = Curve.of(power("LoRA", 0.5))
    assert curve.at_task_loss(1.5, lambda r: r.kl, log=True) == pytest.approx(0.5 / 1.5**2)
    assert math.isnan(curve.at_task_loss(0.9, lambda r: r.kl, log=True))
    assert curve.at_task_loss(3.6, lambda r: r.kl, log=True) == pytest.approx(0.5 / 3.5**2)
    assert curve.ends_before(3.6) and not curve.ends_before(3.4)
    assert at_update_norm(power("LoRA", 0.5), 0.5, lambda r: r.task_loss, log=True) == pytest.approx(2.0)


def test_runs_that_another_beats_are_no_part_of_a_curve() -> None:
    beaten, unstable = run(2.0, 9.0), run(math.nan, 0.0)
    assert Curve.of([*power("LoRA", 0.5), beaten, unstable]) == Curve.of(power("LoRA", 0.5))


@given(st.floats(0.05, 20))
def test_the_area_between_two_curves_is_the_logarithm_of_their_ratio(ratio: float) -> None:
    one, other = Curve.of(power("a", 0.5 * ratio)), Curve.of(power("LoRA", 0.5))
    assert one.mean_log_ratio(other, lambda r: r.kl) == pytest.approx(math.log(ratio), abs=1e-9)
    far = Curve.of([run(0.1, 1.0), run(0.2, 0.5)])
    assert math.isnan(far.mean_log_ratio(other, lambda r: r.kl))


@pytest.mark.parametrize("towards", [-math.inf, math.inf])
def test_an_area_is_found_however_logarithms_are_rounded(towards: float, monkeypatch: pytest.MonkeyPatch) -> None:
    log = math.log  # numpy's differs from it in the last bit on some processors
    monkeypatch.setattr("benchmarks.frontier.comparing.math.log", lambda x: math.nextafter(log(x), towards))
    inner, wide = Curve.of(power("LoRA", 0.5)), Curve.of([run(0.4, 0.5 / 0.4**2), run(7.0, 0.5 / 7.0**2)])
    assert inner.mean_log_ratio(wide, lambda r: r.kl) == pytest.approx(0.0, abs=1e-9)


def test_a_row_compares_with_plain_lora_seed_by_seed() -> None:
    results = [r for seed in (0, 1) for r in (*power("LoRA", 0.5, seed), *power("half", 0.25 + 0.05 * seed, seed))]
    weak = [run(3.9, 0.01, series="weak")]
    costs = {"LoRA": Beside(2.0, 2.0, 100), "half": Beside(6.0, 4.0, 104)}
    found = {row.series: row for row in rows([*results, *weak], 0.8, costs)}
    loss = wanted_loss(power("LoRA", 0.5), 0.8)
    assert loss == pytest.approx(4.0 - 0.8 * 3.0)
    half = found["half"]
    assert half.kl_ratio == Spread(pytest.approx(0.55), pytest.approx(0.5), pytest.approx(0.6), 2)
    assert half.values["KL"].low == pytest.approx(0.25 / loss**2)
    assert half.time == pytest.approx(1.5) and half.memory == pytest.approx(1.04)
    assert math.isnan(found["weak"].time) and math.isnan(found["weak"].memory)
    assert half.loss_at_norm.mean == pytest.approx(loss)
    assert math.isnan(found["weak"].kl_ratio.mean) and list(found)[-1] == "weak"
    strong = rows([*power("LoRA", 0.5), run(1.0, 0.02, series="strong")], 0.8, {})[0]
    assert strong.bound and strong.values["KL"].mean == pytest.approx(0.02) and not half.bound
    assert "| ≤ 0.020 | " in markdown(COLUMNS, [strong])
    columns = COLUMNS | COST_COLUMNS
    lines = markdown(columns, list(found.values())).splitlines()
    assert len(lines) == 2 + 3 and all(line.count("|") == len(columns) + 1 for line in lines)
    assert "–" in lines[-1]


def test_a_change_is_compared_at_its_own_task_loss() -> None:
    plain, ours = ([r for seed in (0, 1) for r in power(name, kl, seed)] for name, kl in (("LoRA", 0.5), ("ours", 0.1)))
    changed = [run(loss, 0.05 / loss**2, series="rank 8", seed=seed) for seed, loss in ((0, 1.7), (1, 2.6), (2, 1.7))]
    far = run(3.8, 0.001, series="penalty only")
    found = {row.series: row for row in changes([*changed, far], ours, plain)}
    assert found["rank 8"].beside_plain == Spread(*[pytest.approx(0.1)] * 3, 2)  # plain LoRA has no third seed
    assert found["rank 8"].beside_ours == Spread(*[pytest.approx(0.5)] * 3, 2)
    assert found["rank 8"].task_loss.mean == pytest.approx(2.15)
    assert found["ours"].beside_ours.mean == pytest.approx(1.0)
    assert math.isnan(found["penalty only"].beside_ours.mean) and list(found)[-1] == "penalty only"
    other_rate = run(1.7, 0.1, series="rank 8", rate=0.5)
    assert {row.series for row in changes([other_rate], ours, plain)} == {"rank 8"}


def test_what_rises_above_the_base_counts_as_kept() -> None:
    assert kept_accuracy(run(1.0, 0.1, accuracy=0.5)) == 1.0
    assert kept_accuracy(run(1.0, 0.1, accuracy=0.3)) == pytest.approx(0.75)
    better = run(1.0, -0.2)  # its prose got better
    assert better.mean_rise == 0.0


def test_a_run_is_found_again_by_its_settings_alone(tmp_path: Path) -> None:
    key = Key(STYLE, {"method": "LoRA", "learning_rate": 1e-3}, 0, 100)
    write(key.path(tmp_path), key, run(1.0, 0.1))
    assert Key(STYLE, {"learning_rate": 1e-3, "method": "LoRA"}, 0, 100).path(tmp_path).exists()
    others = [replace(STYLE, model="other"), replace(STYLE, recipe="other")]
    for other in (*(replace(key, on=on) for on in others), replace(key, seed=1), replace(key, steps=80)):
        assert not other.path(tmp_path).exists()
    assert [read(line) for line in kept(tmp_path, STYLE)] == [run(1.0, 0.1)]
    assert not any(kept(tmp_path, on) for on in others)


def test_a_setting_is_all_that_a_recipe_says_and_the_same_in_another_clone(tmp_path: Path) -> None:
    shutil.copytree(HERE / "data", tmp_path / "data")
    shutil.copy(HERE / "style.yaml", tmp_path)

    def setting(folder: Path, *overrides: str) -> Setting:
        path = folder / "style.yaml"
        return Setting.of(path, load_recipe(path, overrides))

    assert setting(HERE) == setting(tmp_path) == setting(HERE, "training.output_dir=elsewhere")
    for override in "model.model_name_or_path=some/other", "gate.rank=8", "proxy.num_samples=8":
        assert setting(HERE, override) != setting(HERE)


def test_every_method_has_a_look_of_its_own() -> None:
    looks = [tuple(look(name).values()) for name in METHODS]
    assert len(set(looks)) == len(looks) > 15


def test_the_page_gets_tables_and_plots_of_what_was_run(tmp_path: Path) -> None:
    runs, docs = tmp_path / "runs", tmp_path / "docs"
    docs.mkdir()
    page = docs / "frontier.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    series = {"LoRA": 0.5, "gated, λ 64": 0.1, "rank 8": 0.2, "A frozen: rank 16": 0.1}
    series["gated, A frozen, ridge 0.01"] = 0.05
    for number, result in enumerate(run for name, factor in series.items() for run in power(name, factor)):
        key = Key(STYLE, {"number": number}, 0, 100)
        write(key.path(runs), key, result)
    (runs / "costs").mkdir()
    costs = {"LoRA": {"seconds": 2.0, "plain_seconds": 2.0, "peak_bytes": 100}}
    costs_path(runs, STYLE).write_text(json.dumps(costs), "utf-8")
    other = replace(STYLE, recipe="other")
    for result in power("LoRA", 2.0):  # of another recipe, which is to be in no table
        key = Key(other, {"loss": result.task_loss}, 0, 100)
        write(key.path(runs), key, result)
    show(runs, [STYLE], 100, docs)
    assert len((docs / "frontier-runs.jsonl").read_text("utf-8").splitlines()) == 3 * len(series)
    assert json.loads((docs / "frontier-costs.json").read_text("utf-8")) == {"style": costs}
    assert page.read_text("utf-8").count("| 1.00 | 1.00 |\n") == 3
    text = page.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    methods, changed, frozen = re.split("### style: gated, .*, with one thing changed", text)
    assert methods.count("| gated, λ 64 | ") == 3 and "| rank 8 | " not in methods and "(frontier-style.png)" in frozen
    assert changed.count("| rank 8 | 0.001 | 1 | ") == 1 and "| LoRA | " not in changed + frozen
    assert frozen.count("| A frozen: rank 16 | 0.001 | 1 | ") == 1 and "λ 64" not in frozen and "frozen" not in changed
    row = next(line for line in frozen.splitlines() if line.startswith("| A frozen: rank 16"))
    assert row.split(" | ")[6] == "2.00", "twice the KL of A frozen, not of λ 64"
    assert (docs / "frontier-style.png").read_bytes().startswith(b"\x89PNG")
    show(runs, [STYLE], 100, docs)
    assert page.read_text("utf-8") == text
    costs_path(runs, STYLE).unlink()
    show(runs, [STYLE], 100, docs)
    assert "| time | memory |" in text and "| time | memory |" not in page.read_text("utf-8")


def test_without_a_run_the_table_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run of 80 steps is kept in"):
        show(tmp_path, [STYLE], 80, None)
