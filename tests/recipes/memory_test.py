"""Every shipped recipe fits the card that it names, by the estimate and its margin, and says what that is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from folora_q.memory.advice import fits
from folora_q.memory.config import DEMO_CONFIG
from folora_q.memory.estimate import GIB, estimate
from folora_q.memory.shapes import shape_of
from tests.memory.recipes import LLAMA_8B, MISTRAL_7B, QWEN_7B
from tests.recipes.shipped_test import SHIPPED, load

MODELS = {
    "Qwen/Qwen2.5-7B": QWEN_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7B,
    "mistralai/Mistral-7B-Instruct-v0.3": MISTRAL_7B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "demo/SmolLM2-135M-Instruct": DEMO_CONFIG,
}


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem != "demo"], ids=lambda p: p.stem)
def test_it_fits_the_card_that_it_names(path: Path, tmp_path: Path) -> None:
    recipe, text = load(path, tmp_path), path.read_text("utf-8")
    said = re.search(r"for an? (\d+) GB card, not yet measured on one: `folora-q estimate` says ([\d.]+) GiB\.", text)
    assert said, "it names no card"
    found = estimate(recipe, shape_of(MODELS[recipe.model.model_name_or_path]))
    assert fits(found, float(said[1]))
    assert f"{found.peak / GIB:.1f}" == said[2]


def test_the_demo_fits_any_card() -> None:
    path = next(path for path in SHIPPED if path.stem == "demo")
    assert estimate(load(path, path), shape_of(DEMO_CONFIG)).peak < 2 * GIB
