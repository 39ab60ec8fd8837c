"""Runs beside each other: the numbers are those of their files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from folora_q.report.comparison import TableRow, at_ends, at_equal_loss, in_words, names_of, peak_stage, where, written
from folora_q.report.run_record import load_run, same_base, same_data
from folora_q.report.text import short
from folora_q.runs.results import Interval, TextKind
from tests.report.run_folder import BASE_LOSS, Shape, write_run

SMALL = Shape(layers=1)


def load(path: Path, shape: Shape = SMALL, **manifest):
    write_run(path, shape, **manifest)
    return load_run(path)


def test_rows_hold_what_the_evaluations_say(tmp_path: Path) -> None:
    gated = load(tmp_path / "a")
    plain = load(tmp_path / "b", Shape(layers=1, gated=False, final_loss=0.11, kl_scale=1.5, score=False))
    rows = {row.label: row for row in at_ends([gated, plain])}
    task = rows["task: loss"]
    assert task.base == BASE_LOSS and [found.value for found in task.estimates] == [0.043, 0.11]
    assert rows["task: exact match"].estimates[1] is None and rows["task: exact match"].base == 0.0
    kl = rows["generated text: KL"]
    assert [found.value for found in kl.estimates] == [0.125, 1.5] and kl.best == 0 and kl.base == 0.0
    for run, found in zip((gated, plain), rows["code: rise of the loss"].estimates, strict=True):
        assert found == run.evaluation.text("code").loss.change
    norm = math.sqrt(sum(layer.update_norm**2 for layer in gated.evaluation.layers))
    assert rows["size of the update, ‖ΔW‖"].estimates[0].value == pytest.approx(norm)
    seconds = sum(stage["seconds"] for stage in gated.manifest["stages"])
    assert rows["time"].estimates[0].value == pytest.approx(seconds)
    assert written(rows["time"].estimates[0].value, "time") == "8 min 08 s"
    assert written(rows["peak memory"].estimates[0].value, "memory") == "3.20 GiB"


def test_a_number_is_best_only_where_its_interval_lies_apart() -> None:
    def row(*estimates: Interval | None, lower: bool | None = True) -> TableRow:
        return TableRow("x", ".1f", None, list(estimates), lower)

    low, near, high = Interval(1, 0.9, 1.1), Interval(1.15, 1.05, 1.2), Interval(2, 1.9, 2.1)
    assert row(high, low).best == 1 and row(high, low, lower=False).best == 0
    assert row(low, near, high).best is None
    assert row(low, None).best is None and row(low, high, lower=None).best is None
    assert row(Interval(math.nan, 0, 0), low, high).best == 1


def test_at_equal_loss_kl_is_between_the_measurements_around_it(tmp_path: Path) -> None:
    gated = load(tmp_path / "a")
    slow = load(tmp_path / "b", Shape(layers=1, gated=False, final_loss=0.11, kl_scale=0.3))
    bare = load(tmp_path / "c", Shape(layers=1, every=None, final_loss=0.08))
    equal = at_equal_loss([gated, slow, bare])
    assert equal.loss == 0.11 and equal.learned
    first, second, third = equal.reached
    before, after = first.between
    assert before.loss > 0.11 > after.loss and after.step - before.step == 20
    share = (before.loss - 0.11) / (before.loss - after.loss)
    assert first.kl == pytest.approx(before.kl ** (1 - share) * after.kl**share)
    assert where(first) == f"interpolated, step {before.step} to step {after.step}"
    assert second.kl == pytest.approx(0.9 * 0.3) and where(second) == "measured at step 200"
    assert third is None
    # Alone with runs that learned more, a run without measurements along training has its end to offer.
    found = at_equal_loss([bare, load(tmp_path / "d")]).reached
    assert found[0].kl == pytest.approx(0.9 * 0.125) and where(found[0]) == "measured at the end"


def test_the_sentences_give_the_multiple_of_kl_and_each_run(tmp_path: Path) -> None:
    gated = load(tmp_path / "a")
    plain = load(tmp_path / "b", Shape(layers=1, gated=False, final_loss=0.11, kl_scale=1.5))
    equal = at_equal_loss([gated, plain])
    multiple = equal.reached[1].kl / equal.reached[0].kl
    first, *others = in_words([gated, plain], equal)
    assert first == f"At task loss {short(equal.loss)}, b had {short(multiple)} times the KL of a."
    assert [sentence.partition(":")[0] for sentence in others] == ["a, at the end"] * 2 + ["b, at the end"] * 2
    assert in_words([gated, plain], None) == others


def test_the_end_is_measured_as_along_training_and_counts_where_it_is_another_moment(tmp_path: Path) -> None:
    run = load(tmp_path / "a")
    own = run.evaluation.of_kind(TextKind.GENERATED)
    tokens = sum(text.tokens for text in own)
    assert run.end.kl == pytest.approx(sum(text.kl.value * text.tokens for text in own) / tokens)
    assert run.end.agreement == pytest.approx(sum(text.top1_agreement.value * text.tokens for text in own) / tokens)
    assert run.course == run.points and run.course[-1].step == 200
    with run.folder.metrics.open("a") as file:
        file.write('{"stage": "training", "step": 205, "train_runtime": 3.0}\n')
    assert load_run(run.folder.path).course == [*run.points, run.end]
    bare = load(tmp_path / "b", Shape(layers=1, every=None))
    assert bare.course == [bare.end]


def test_the_peak_is_the_devices_where_it_was_measured(tmp_path: Path) -> None:
    stages = [
        {"title": t, "seconds": 1, "peak_bytes": b, "memory": m} for t, b, m in (("a", 9, "host"), ("b", 5, "device"))
    ]
    assert peak_stage(load(tmp_path / "a", stages=stages)).title == "b"
    assert peak_stage(load(tmp_path / "b", stages=stages[:1])).title == "a"
    assert peak_stage(load(tmp_path / "c", stages=[])) is None


def test_a_run_that_learned_nothing_leaves_nothing_to_compare(tmp_path: Path) -> None:
    worse = load(tmp_path / "a", Shape(layers=1, final_loss=3.5))
    equal = at_equal_loss([worse, load(tmp_path / "b")])
    assert equal is not None and not equal.learned
    empty = load_run_without_results(tmp_path / "c")
    assert at_equal_loss([worse, empty]) is None


def load_run_without_results(path: Path):
    path.mkdir()
    (path / "run.json").write_text('{"status": "running"}')
    return load_run(path)


def test_base_and_data_are_compared_as_far_as_they_are_known(tmp_path: Path) -> None:
    a, b = load(tmp_path / "a"), load(tmp_path / "b", Shape(layers=1, fingerprint="other"))
    c = load(tmp_path / "c", model=None, data_sha256={"elsewhere/train.jsonl": "1"})
    d = load(tmp_path / "d", data_sha256=dict(reversed(a.manifest["data_sha256"].items())))
    assert same_base([a, d]) is True and same_base([a, b]) is False and same_base([a, c]) is None
    assert same_base([a, b, c]) is False
    assert same_data([a, b, d]) and not same_data([a, c]) and same_data([a, load_run_without_results(tmp_path / "e")])


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [load(tmp_path / "x" / "demo"), load(tmp_path / "y" / "demo"), load(tmp_path / "other")]
    assert names_of(runs) == [str(tmp_path / "x" / "demo"), str(tmp_path / "y" / "demo"), "other"]
