"""The pages say what the files say, whatever stands in these, and however much of a run there is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from folora_q.errors import UserError
from folora_q.report.page import comparison_page, report_page, samples
from folora_q.report.run_record import Run, load_run
from folora_q.report.text import number, short, wall_time
from folora_q.runs.result_files import to_json
from folora_q.runs.results import AnswerResult, Interval, TextKind
from tests.report.page_parts import Cell, Parts, parts_of
from tests.report.run_folder import Shape, answers, evaluation, gates, write_run

SMALL = Shape(layers=2, harness=True)
# Without figures of layers a page takes a tenth of the time.
QUICK = Shape(layers=0, every=None)
PLAIN = Shape(layers=2, gated=False, final_loss=0.044, kl_scale=1.53, seed=1)
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><b>\x1b[31m\x00{{ 7 * 7 }}$\\frac$"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "demo", SMALL)
    write_run(root / "demo-plain", PLAIN)
    return load_run(root / "demo"), load_run(root / "demo-plain")


@pytest.fixture(scope="module")
def html(runs: tuple[Run, Run]) -> str:
    return report_page(*runs).html


@pytest.fixture(scope="module")
def page(html: str) -> Parts:
    return parts_of(html)


def shown(estimate: Interval, form: str, signed: bool = False) -> str:
    return "".join(
        (number(estimate.value, form, signed), number(estimate.low, form, signed), number(estimate.high, form, signed))
    )


def check(cell: Cell, estimate: Interval, form: str = ".4f", signed: bool = False) -> None:
    """The values in the page's markup are exactly the file's, and what is read is their rounded form."""
    assert [float(value) for value in cell.values] == [estimate.value, estimate.low, estimate.high]
    assert cell.text.replace(" to ", "").replace(" points", "") == shown(estimate, form, signed)


def test_every_number_of_the_main_table_is_the_files(runs: tuple[Run, Run], page: Parts) -> None:
    found = runs[0].evaluation
    rows = {row[0].text: row[1:] for row in page.tables["full numbers"] if len(row) > 1}
    assert list(rows)[0] == "held-out text" and len(rows) == 1 + len(found.texts) + 1
    for text in found.texts:
        cells = rows[f"{text.name}: loss{text.texts} texts, {text.tokens:,} tokens"]
        check(cells[0], text.loss.base)
        check(cells[1], text.loss.tuned)
        check(cells[2], text.loss.change, signed=True)
        check(cells[3], text.kl)
        check(cells[4], text.top1_agreement, ".1%")
    cells = rows["task: exact match96 answers"]
    check(cells[0], found.score.score.base, ".1%")
    check(cells[1], found.score.score.tuned, ".1%")
    check(cells[2], found.score.score.change, "points", signed=True)
    assert [cell.text for cell in cells[3:]] == ["", ""]


def test_the_headline_says_it_in_words(page: Parts) -> None:
    text = " ".join(page.text.split())
    assert "0.0430from 2.83" in text and "72.9%from 0.0%" in text
    assert "the loss fell: −2.790 nats per token (95% interval −2.840 to −2.740)" in text
    assert "the tuned model’s KL from it is 0.125 nats per token" in text
    assert "On general text (code) the loss rose: +0.1925 nats per token (+0.1835 to +0.2015)" in text
    assert (
        "At equal task loss, 0.0440, demo-plain (plain QLoRA) had 12.3 times the KL of this run: 1.38 against 0.112."
        in text
    )


def test_a_change_that_chance_explains_is_not_called_one(tmp_path: Path) -> None:
    found = evaluation(tmp_path, QUICK)
    texts = [replace(t, loss=replace(t.loss, change=Interval(0.01, -0.01, 0.03))) for t in found.texts]
    run = write_run(tmp_path / "run", QUICK)
    run.evaluation.write_text(to_json(replace(found, texts=texts)))
    text = " ".join(parts_of(report_page(load_run(run.path)).html).text.split())
    assert (
        "the loss did not change by more than chance can explain: +0.0100 nats per token (−0.0100 to +0.0300)" in text
    )


def test_the_other_tables_hold_the_files_numbers(runs: tuple[Run, Run], page: Parts) -> None:
    run, plain = runs
    for result, row in zip(run.evaluation.harness, page.tables["full harness"][1:], strict=True):
        assert row[0].text == result.task and row[2].text == str(result.samples)
        assert [float(row[n].values[0]) for n in (3, 4, 5)] == [result.base, result.tuned, result.tuned - result.base]
    for layer, row in zip(run.evaluation.layers, page.tables["dense layers"][1:], strict=True):
        values = (
            layer.drift[TextKind.GENERATED],
            layer.predicted[TextKind.GENERATED],
            layer.drift["task"],
            layer.predicted["task"],
        )
        values += layer.energy_kept["a"], layer.energy_kept["b"], layer.update_norm
        assert [cell.text for cell in row] == [layer.name, *map(short, values)]
    for gate, row in zip(run.gates, page.tables["dense gates"][1:], strict=True):
        over = sum(value > 0.5 for value in gate.values)
        numbers = [str(gate.dim), str(len(gate.quotients)), short(gate.quotients[0]), str(over), short(gate.mean_value)]
        numbers += [short(gate.complement_quotient), short(gate.complement_value)]
        assert [cell.text for cell in row] == [", ".join(gate.modules), *numbers]
    for point, row in zip(run.points, page.tables["dense"][1:], strict=True):
        assert row[0].text == f"{point.step:,}"
        assert [float(cell.values[0]) for cell in row[1:]] == [point.loss, point.kl, point.agreement]
    ends = {row[0].text: row[1:] for row in page.tables["full ends"]}
    for position, one in ((1, run), (2, plain)):
        estimate = one.evaluation.text("generated text, cut").kl
        assert float(ends["generated text, cut: KL"][position].values[0]) == estimate.value
    assert float(page.tables["full equal"][0][0].values[0]) == 0.044


def test_figures_answers_times_and_origins_are_there(page: Parts) -> None:
    assert page.tags.count("figure") == page.tags.count("svg") == 15
    assert page.tags.count("article") == 9
    assert len(set(page.ids)) == len(page.ids)
    for text in ("answered right", "answered not right", "general prompt", "Why is the sky blue?", "gate_lambda: 16"):
        assert text in page.text, text
    for said in (
        "2.13.0",
        "9f2c" * 16,
        "6fe1c0f5e4bf",
        "24 November 2026, 20:14 UTC",
        "8 min 08 s",
        "3.20 GiB of host memory at most",
    ):
        assert said in page.text, said
    links = {value for key, value in page.attributes if key == "href" and not value.startswith("#layers")}
    assert {link.removeprefix("#") for link in links if link.startswith("#")} <= set(page.ids)


def test_a_page_asks_for_nothing_else(html: str, page: Parts) -> None:
    assert "default-src 'none'" in html
    assert "http:" not in html and "https:" not in html
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", replace(SMALL, layers=1))
    one, two = (report_page(replace(load_run(folder.path), gates=[])).html for _ in range(2))
    assert one == two


def test_what_stands_in_the_files_is_text(tmp_path: Path) -> None:
    """Markup, templates, formulas and control characters, in every place that a file has for text."""
    found = evaluation(tmp_path, SMALL)
    hostile = replace(
        found,
        tuned=ATTACK,
        base=ATTACK,
        held=ATTACK,
        texts=[replace(text, name=ATTACK + text.name) for text in found.texts],
        score=replace(found.score, metric=ATTACK),
        layers=[replace(layer, name=f"{ATTACK}.{n}.{ATTACK}") for n, layer in enumerate(found.layers)],
        harness=[replace(result, task=ATTACK, metric=ATTACK) for result in found.harness],
    )
    folder = write_run(
        tmp_path / "run <b>&amp;",
        SMALL,
        status=ATTACK,
        error=ATTACK,
        started=ATTACK,
        hardware=ATTACK,
        model={"name": ATTACK, ATTACK: ATTACK},
        versions={ATTACK: ATTACK},
        seeds={ATTACK: [ATTACK]},
        data_sha256={ATTACK: {ATTACK: None}},
        stages=[{"title": ATTACK, "seconds": 1, "peak_bytes": 1, "memory": ATTACK}],
    )
    folder.evaluation.write_text(to_json(hostile), encoding="utf-8")
    gated = [replace(gate, modules=[f"{ATTACK}.{n}.{ATTACK}"]) for n, gate in enumerate(gates(SMALL))]
    folder.gate_results.write_text(to_json(gated), encoding="utf-8")
    folder.recipe.write_text(f"gate: {json.dumps(ATTACK)}\n# {ATTACK}", encoding="utf-8")
    said = [
        replace(a, prompt=[{"role": ATTACK, "content": ATTACK}] * 2, base=ATTACK, tuned=ATTACK, reference=ATTACK)
        for a in answers(SMALL)
    ]
    folder.write_lines(
        folder.answers, [a.__dict__ for a in [*said, AnswerResult("general", [], None, "", "\ud83d half")]]
    )
    run = load_run(folder.path)
    for html in (report_page(run, run).html, comparison_page([run, run], [ATTACK]).html):
        assert "http:" not in html and "https:" not in html
        page = parts_of(html)
        assert not {"script", "img", "b"} & set(page.tags)
        assert not [key for key, _ in page.attributes if key.startswith("on")]
        assert "\x1b" not in html and "\x00" not in html
        assert "<script>alert(1)</script>" in page.text and "\\x1b[31m" in page.text and "{{ 7 * 7 }}" in page.text


def test_an_unfinished_run_says_so_and_shows_what_there_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SMALL, status="interrupted", error="stopped by hand")
    for path in (folder.evaluation, folder.gate_results, folder.answers):
        path.unlink()
    with folder.metrics.open("a") as file:
        file.write('{"stage": "training", "st')
    made = report_page(load_run(folder.path))
    page = parts_of(made.html)
    text = " ".join(page.text.split())
    assert "This run is not finished: it is marked as interrupted. stopped by hand" in text
    assert "below is what was measured during training" in text and "star" not in text
    assert [picture.name for picture in made.pictures] == ["course", "trade-off", "costs"]
    assert "full numbers" not in page.tables


def test_a_run_that_has_only_begun_and_an_old_one_give_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        '{"status": "running", "seconds": {"training": 61.2}, "versions": 3, "model": []}'
    )
    made = report_page(load_run(tmp_path))
    assert "it is marked as running" in made.html and "contains no recipe" in made.html
    assert [picture.name for picture in made.pictures] == ["costs"]
    (tmp_path / "run.json").write_text("{}")
    assert "it is marked as unknown" in report_page(load_run(tmp_path)).html


def test_an_evaluation_of_an_adapter_from_elsewhere_is_finished(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "found", QUICK)
    for path in (folder.recipe, folder.metrics, folder.gate_results):
        path.unlink()
    folder.evaluation.write_text(to_json(replace(evaluation(tmp_path, QUICK), tuned="their-adapter")), encoding="utf-8")
    folder.write_manifest({"status": "evaluation", "stages": [{"title": "t", "seconds": 1, "peak_bytes": None}]})
    page = parts_of(report_page(load_run(folder.path)).html)
    assert "not finished" not in page.text and "their-adapter on demo/SmolLM2" in page.text
    assert "full numbers" in page.tables


def test_plain_qlora_has_no_section_on_the_gate(runs: tuple[Run, Run]) -> None:
    page = parts_of(report_page(runs[1]).html)
    assert "plain QLoRA" in page.text and "gate" not in page.ids and "compared" not in page.ids and "moved" in page.ids


def test_numbers_that_are_none_are_dashes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", QUICK)
    text = folder.evaluation.read_text("utf-8")
    folder.evaluation.write_text(re.sub(r'"(value|low|high)": [-\d.e]+', r'"\1": NaN', text), encoding="utf-8")
    page = parts_of(report_page(load_run(folder.path)).html)
    assert page.tables["full numbers"][2][1].text.startswith("–– to –")


def test_comparison_page_marks_what_is_interpolated(runs: tuple[Run, Run], tmp_path: Path) -> None:
    write_run(tmp_path / "bare", Shape(layers=1, every=None, final_loss=0.04))
    page = parts_of(comparison_page([*runs, load_run(tmp_path / "bare")], ["a note"]).html)
    rows = page.tables["full equal"]
    assert [cell.text for cell in rows[1][1:]] == ["0.1119interpolated", "1.3770", "–"]
    assert [cell.text for cell in rows[3][1:]] == ["step 180 to step 200", "measured at step 200", "not measured there"]
    assert "train with evaluation.steps set" in page.text and "a note" in page.text
    assert page.tags.count("figure") == 1 + 2 * 3


def test_damaged_files_are_the_users_to_know(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SMALL)
    for path, content in (
        (folder.manifest, "[]"),
        (folder.manifest, "{"),
        (folder.evaluation, "{}"),
        (folder.answers, "{}"),
    ):
        before = path.read_bytes()
        path.write_text(content)
        with pytest.raises(UserError, match=path.name):
            load_run(folder.path)
        path.write_bytes(before)


def test_samples_are_a_few_of_each_kind() -> None:
    found = samples(answers(SMALL))
    assert [sample.heading for sample in found] == ["right"] * 3 + ["not right"] * 3 + ["general"] * 3
    assert found[0].asked.startswith("We will be 1") and found[0].before == "system: Turn the booking into JSON."
    unscored = [replace(answer, tuned_score=None) for answer in answers(SMALL)]
    assert [sample.heading for sample in samples(unscored)] == ["held out"] * 4 + ["general"] * 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0430, "0.0430"), (2.833, "2.83"), (12345.6, "12,346"), (-0.5, "−0.500"), (2.2e-6, "2.2e−6")],
)
def test_three_digits_count(value: float, text: str) -> None:
    assert short(value) == text


def test_signs_and_times() -> None:
    assert number(-0.00001, ".4f", True) == "0.0000" and number(0.1, ".4f", True) == "+0.1000"
    assert number(float("nan")) == number(None) == "–" and number(-2.0, ".1f") == "−2.0"
    assert [wall_time(s) for s in (0.04, 9.4, 12.3, 59.7, 61, 3599, 3605, 90000)] == [
        "0.0 s",
        "9.4 s",
        "12 s",
        "1 min 00 s",
        "1 min 01 s",
        "59 min 59 s",
        "1 h 00 min",
        "25 h 00 min",
    ]
