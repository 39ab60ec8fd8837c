"""Every shipped recipe fits the card that it names, by the estimate and its margin, and says what that is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from folora_q.memory.config import DEMO_MODEL, read_config
from folora_q.memory.estimate import GIB, estimate
from folora_q.memory.shapes import shape_of
from tests.recipes.shipped_test import SHIPPED, load


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem != "demo"], ids=lambda p: p.stem)
def test_it_fits_the_card_that_it_names(path: Path, tmp_path: Path) -> None:
    recipe, text = load(path, tmp_path), path.read_text("utf-8")
    said = re.search(r"for an? (\d+) GB card, not yet measured on one: `folora-q estimate` says ([\d.]+) GiB\.", text)
    assert said, "it names no card"
    found = estimate(recipe, shape_of(read_config(recipe.model.model_name_or_path)))
    assert found.fits(float(said[1]))
    assert f"{found.peak / GIB:.1f}" == said[2]


def test_the_demo_fits_any_card() -> None:
    path = next(path for path in SHIPPED if path.stem == "demo")
    assert estimate(load(path, path), shape_of(read_config(DEMO_MODEL))).peak < 2 * GIB
