"""Figures from any data: SVG that can stand in a page, PNG, the same bytes for the same numbers."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from folora_q.report.figure_set import (
    cost_pictures,
    course_pictures,
    drift_pictures,
    gate_pictures,
    layer_pictures,
    trade_off_pictures,
)
from folora_q.report.layers import Quantity, grid_of
from folora_q.report.render import Picture, png, svg
from folora_q.report.run_record import Run, StageTime, load_run
from folora_q.report.style import PALETTE, VARIABLES
from folora_q.runs.folder import RunFolder
from folora_q.runs.results import GateResult, LayerResult
from tests.report.run_folder import Shape, evaluation, gates, metrics, write_run

# Markup, a formula that matplotlib cannot parse, controls that steer terminals, and signs that no XML may hold.
HOSTILE = '<script>alert(1)</script>.3.$\\frac{$\x1b[31m\x00\ufffe"\'&#0b6b7d style="x"'


def run_of(shape: Shape, **changes) -> Run:
    path = Path("runs/demo")
    known = {"metrics": metrics(shape), "evaluation": evaluation(path, shape), "gates": gates(shape)}
    return Run(folder=RunFolder(path), name="demo", **known | changes)


def all_pictures(run: Run) -> list[Picture]:
    return [
        *course_pictures(run),
        *trade_off_pictures([run, run], ["one", "two"], 0.1),
        *layer_pictures(run),
        *gate_pictures(run),
        *cost_pictures(run),
        *drift_pictures([run, run], ["one", "two"]),
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    path = tmp_path_factory.mktemp("runs") / "demo"
    write_run(path, Shape(layers=3))
    return all_pictures(load_run(path))


def test_a_whole_run_has_every_figure(pictures: list[Picture]) -> None:
    names = (
        "course trade-off layers-drift-own layers-drift-task layers-norm drift-predicted layers-quotient layers-gate "
    )
    names += "layers-energy-a layers-energy-b spectrum-1 spectrum-2 spectrum-3 spectrum-4 costs "
    names += "drift-own-1 drift-task-1 drift-own-2 drift-task-2"
    assert [picture.name for picture in pictures] == names.split()
    for picture in pictures:
        assert picture.title and picture.caption.endswith(".") and len(picture.alt) > 20, picture.name


def test_svg_belongs_to_the_page(pictures: list[Picture]) -> None:
    ids: list[str] = []
    for picture in pictures:
        text = svg(picture)
        root = ElementTree.fromstring(text)
        assert root.tag == "svg" and root.attrib["role"] == "img" and root.attrib["aria-label"] == picture.alt
        assert not re.search(r"#[0-9a-f]{6}", text), f"{picture.name} has a colour that does not follow the page"
        assert "font-family" not in text and "http" not in text
        assert not [element for element in root.iter("style") if element.text]
        assert picture.title not in ["".join(element.itertext()) for element in root.iter("text")]
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) == set(own)
        ids += own
    assert len(set(ids)) == len(ids)


def test_png_has_a_light_ground_and_the_resolution_for_print(pictures: list[Picture]) -> None:
    image = Image.open(io.BytesIO(png(pictures[0].figure)))
    assert image.width > 700
    assert image.convert("RGB").getpixel((1, 1)) == tuple(int(PALETTE["surface"][0][i : i + 2], 16) for i in (1, 3, 5))


def test_the_same_numbers_give_the_same_bytes() -> None:
    shape = Shape(layers=2)
    one, two = (layer_pictures(run_of(shape))[:1] + course_pictures(run_of(shape)) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        assert png(first.figure) == png(second.figure)
        assert svg(first) == svg(second)


def test_no_two_things_share_a_colour() -> None:
    assert len(VARIABLES) == len(PALETTE)


def test_what_is_not_there_is_not_drawn() -> None:
    shape = Shape(layers=1)
    assert all_pictures(run_of(shape, metrics=[], evaluation=None, gates=[])) == []
    bare = run_of(Shape(layers=1, every=None), evaluation=None, gates=[])
    (course,) = all_pictures(bare)
    assert course.name == "course" and "evaluation.steps was not set" in course.caption
    without_kl = [line for line in metrics(shape) if "loss" in line] + [{"step": 0, "eval_loss": 3.0}]
    assert [p.name for p in all_pictures(run_of(shape, metrics=without_kl, evaluation=None, gates=[]))] == ["course"]
    found = run_of(Shape(layers=1, gated=False), gates=[])
    assert "drift-predicted" not in [picture.name for picture in all_pictures(found)]


def test_hostile_names_and_numbers_are_drawn_as_they_are() -> None:
    shape = Shape(layers=1)
    odd = (math.nan, math.inf, -1.0, 0.0, 1e-300, 1e300)
    layers = [LayerResult(f"{HOSTILE}.{n}", {"own": x, "task": x}, {"own": x}, {"a": x}, x) for n, x in enumerate(odd)]
    found = [
        GateResult([HOSTILE, HOSTILE], 3, 1.0, [1e300, 1.0, 0.0], [1.0, 0.5, 0.0], 0.1, 0.1),
        GateResult([], 0, 0.0, [], [], math.nan, math.nan),
        GateResult(["x.1"], 2, 1.0, [2.0], [], 0.0, 0.0),
        GateResult(["x.2"], 2, -1.0, [-2.0, math.nan, math.inf], [0.1, 0.2, 0.3], 0.0, 0.0),
    ]
    run = run_of(
        shape,
        gates=found,
        evaluation=replace(evaluation(Path("x"), shape), layers=layers),
        manifest={"stages": [{"title": HOSTILE, "seconds": 0, "peak_bytes": 1 << 60, "memory": HOSTILE}, {}, 3]},
    )
    pictures = [*all_pictures(run), *trade_off_pictures([run], [HOSTILE * 9])]
    assert len(pictures) > 10
    for picture in pictures:
        text = svg(picture)
        assert "<script" not in text and "\x1b" not in text and "\x00" not in text
        ElementTree.fromstring(text)
        assert png(picture.figure)[1:4] == b"PNG"


def test_one_value_alone_can_be_drawn() -> None:
    for value in (0.0, 1.0):
        for logarithmic in (True, False):
            quantity = Quantity("drift-own", "Drift", "a number", logarithmic, grid_of([(["a.0.b"], value)]))
            from folora_q.report.heatmaps import heat_map

            assert png(heat_map(quantity))[1:4] == b"PNG"


def test_a_run_of_an_earlier_version_has_its_times() -> None:
    run = run_of(Shape(layers=1), manifest={"seconds": {"training": 12.4, "odd": "x"}})
    assert run.stages == [StageTime("training", 12.4)]
    (picture,) = cost_pictures(run)
    assert picture.title == "Time by stage"
