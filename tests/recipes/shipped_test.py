"""The recipes that are shipped: files to copy, so each loads as it stands, and says what it is and what it is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from folora_q.recipe import Recipe, load_recipe
from folora_q.recipe.gate_rules import GATE_RULES
from folora_q.recipe.paths import HUB_ID

FOLDER = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(FOLDER.glob("*.yaml"))
BY_CARD = [path for path in SHIPPED if re.fullmatch(r"[78]b-\d+gb-[a-z]+", path.stem)]
SEVERAL_CARDS = [path for path in SHIPPED if "-2x24gb-" in path.stem]
SCHEMA_LINE = "# yaml-language-server: $schema=recipe.schema.json"
FAMILIES = ("meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B", "Qwen/Qwen2.5-7B")
LONGEST_TITLE = 74

each_recipe = pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
each_by_card = pytest.mark.parametrize("path", BY_CARD, ids=lambda p: p.stem)


def load(path: Path, tmp_path: Path) -> Recipe:
    """The recipe; data that are the user's to bring are stood in for."""
    given = yaml.safe_load(path.read_text("utf-8"))["data"]["train_dataset"]
    if not isinstance(given, str) or HUB_ID.fullmatch(given) or (path.parent / given).exists():
        return load_recipe(path)
    stand_in = tmp_path / "train.jsonl"
    stand_in.write_text('{"text": "a"}\n', encoding="utf-8")
    return load_recipe(path, [f"data.train_dataset={stand_in}"])


def family(recipe: Recipe) -> str:
    return next(name for name in FAMILIES if recipe.model.model_name_or_path.startswith(name))


@each_recipe
def test_it_loads(path: Path, tmp_path: Path) -> None:
    assert isinstance(load(path, tmp_path), Recipe)


@each_recipe
def test_it_begins_with_the_schema_and_a_title(path: Path) -> None:
    schema, title, *_ = path.read_text("utf-8").splitlines()
    assert schema == SCHEMA_LINE
    assert re.match(r"# \w", title)
    assert len(title.removeprefix("# ")) <= LONGEST_TITLE


def test_titles_differ() -> None:
    titles = [path.read_text("utf-8").splitlines()[1] for path in SHIPPED]
    assert len(set(titles)) == len(titles)


@each_recipe
def test_it_says_how_to_run_it(path: Path) -> None:
    program = "torchrun --nproc-per-node 2 -m folora_q" if path in SEVERAL_CARDS else "folora-q"
    assert f"#   {program} train {path.stem}" in path.read_text("utf-8")


@each_recipe
def test_it_writes_to_a_folder_of_its_own_name(path: Path, tmp_path: Path) -> None:
    assert load(path, tmp_path).training.output_dir == f"runs/{path.stem}"


@each_recipe
def test_the_best_step_can_be_found_where_it_is_asked_for(path: Path, tmp_path: Path) -> None:
    recipe = load(path, tmp_path)
    if recipe.training.load_best_model_at_end:
        assert recipe.evaluation.steps and recipe.training.save_steps
        assert recipe.training.save_steps % recipe.evaluation.steps == 0


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.stem != "demo"], ids=lambda p: p.stem)
def test_sixteen_rows_make_a_step(path: Path, tmp_path: Path) -> None:
    training = load(path, tmp_path).training
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.stem != "demo"], ids=lambda p: p.stem)
def test_memory_is_saved_and_no_measurement_is_claimed(path: Path, tmp_path: Path) -> None:
    recipe = load(path, tmp_path)
    assert recipe.training.activation_checkpointing
    assert recipe.training.optim == "paged_adamw_8bit"
    card = re.search(r"-(\d+)gb-", path.stem)
    size = card[1] if card else r"\d+"
    cards, them = ("two 24 GB cards", "them") if path in SEVERAL_CARDS else (f"an? {size} GB card", "one")
    assert re.search(f"# Sized by arithmetic for {cards}, not yet measured on {them}", path.read_text("utf-8"))


def test_there_is_one_for_every_task_and_card() -> None:
    found = [re.fullmatch(r"[78]b-(\d+)gb-([a-z]+)", path.stem) for path in BY_CARD]
    assert sorted((name[2], int(name[1])) for name in found if name) == [
        (task, card) for task in ("code", "instruct", "math") for card in (8, 12, 16, 24)
    ]


def test_every_family_is_there_for_small_and_for_large_cards() -> None:
    cards: dict[str, list[int]] = {name: [] for name in FAMILIES}
    for path in BY_CARD:
        cards[family(load_recipe(path))].append(int(path.stem.split("-")[1].removesuffix("gb")))
    for name, sizes in cards.items():
        assert len(sizes) >= 3, name
        assert min(sizes) <= 12 and max(sizes) >= 16, name


@each_by_card
def test_the_size_in_the_name_is_the_models(path: Path) -> None:
    assert f"-{path.stem.split('-')[0].upper()}-" in load_recipe(path).model.model_name_or_path


@each_by_card
def test_the_gate_is_on_with_the_default_rate(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.gate.enabled and recipe.gate.rule == "frozen"
    assert recipe.training.learning_rate == GATE_RULES["frozen"].learning_rate
    assert recipe.adapter.r == recipe.adapter.lora_alpha == (32 if "-8gb-" in path.stem else 64)
    assert recipe.proxy.source == "mixed" and recipe.proxy.num_samples == 256


def test_a_larger_card_is_given_more_tokens_at_a_time() -> None:
    tokens: dict[str, list[tuple[int, int]]] = {}
    for path in BY_CARD:
        _, card, task = path.stem.split("-")
        training = load_recipe(path).training
        at_once = training.per_device_train_batch_size * training.max_length
        tokens.setdefault(task, []).append((int(card.removesuffix("gb")), at_once))
    for task, sizes in tokens.items():
        at_once = [tokens_at_once for _, tokens_at_once in sorted(sizes)]
        assert at_once == sorted(set(at_once)), task


def test_the_baseline_is_plain_qlora(tmp_path: Path) -> None:
    recipe = load(FOLDER / "qlora-baseline.yaml", tmp_path)
    assert not recipe.gate.enabled
    assert (recipe.adapter.r, recipe.adapter.lora_alpha, recipe.training.learning_rate) == (16, 32, 2e-4)


def test_reading_on_loses_no_text(tmp_path: Path) -> None:
    recipe = load(FOLDER / "continued-pretraining.yaml", tmp_path)
    assert recipe.data.overlong == "split" and recipe.training.packing
    assert recipe.proxy.source == "bos"
