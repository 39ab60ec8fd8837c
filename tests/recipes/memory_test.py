"""Every shipped recipe fits the card that it names, by the estimate and its margin, and says what that is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from folora_q.memory.config import DEMO_MODEL, read_config
from folora_q.memory.estimate import GIB, estimate
from folora_q.memory.micro_batches import divided_among, of_one_process, plan_step
from folora_q.memory.shapes import shape_of
from tests.recipes.shipped_test import SEVERAL_CARDS, SHIPPED, load


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if path.stem != "demo" and path not in SEVERAL_CARDS], ids=lambda p: p.stem
)
def test_it_fits_the_card_that_it_names(path: Path, tmp_path: Path) -> None:
    recipe, text = load(path, tmp_path), path.read_text("utf-8")
    said = re.search(r"for an? (\d+) GB card, not yet measured on one: `folora-q estimate` says ([\d.]+) GiB\.", text)
    assert said, "it names no card"
    found = estimate(recipe, shape_of(read_config(recipe.model.model_name_or_path)))
    assert found.fits(float(said[1]))
    assert f"{found.peak / GIB:.1f}" == said[2]


@pytest.mark.parametrize("path", SEVERAL_CARDS, ids=lambda p: p.stem)
def test_it_fits_the_cards_that_it_names(path: Path, tmp_path: Path) -> None:
    recipe = of_one_process(divided_among(load(path, tmp_path), 2), 2)
    shape = shape_of(read_config(recipe.model.model_name_or_path))
    plan = plan_step(recipe, replace(shape, gpus=2), 24)
    assert plan.memory.fits(24)
    assert f"--gpus 2 --gpu 24 says {plan.memory.peak / GIB:.1f} GiB each" in path.read_text("utf-8")
    places = {"14b": "none", "32b": "shard", "70b": "offload"}
    assert plan.recipe.model.fsdp == places[path.stem.split("-")[0]]


def test_seventy_billion_parameters_are_shared_by_four_cards(tmp_path: Path) -> None:
    path = next(path for path in SEVERAL_CARDS if path.stem.startswith("70b"))
    recipe = of_one_process(divided_among(load(path, tmp_path), 4), 4)
    shape = shape_of(read_config(recipe.model.model_name_or_path))
    assert plan_step(recipe, replace(shape, gpus=4), 24).recipe.model.fsdp == "shard"


def test_the_demo_fits_any_card() -> None:
    path = next(path for path in SHIPPED if path.stem == "demo")
    assert estimate(load(path, path), shape_of(read_config(DEMO_MODEL))).peak < 2 * GIB
