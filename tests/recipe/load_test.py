from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from folora_q.errors import UserError
from folora_q.recipe import load_recipe

MINIMAL = """\
model:
  model_name_or_path: some/model
data:
  train_dataset: train.jsonl
training:
  output_dir: runs/x
"""


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text("{}\n")

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return caught.value


def test_a_resolved_recipe_loads_again_to_the_same(write, tmp_path: Path) -> None:
    recipe = load_recipe(write(MINIMAL))
    again = tmp_path / "elsewhere" / "resolved.yaml"
    again.parent.mkdir()
    again.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(again) == recipe


def test_paths_are_relative_to_the_recipe_and_hub_ids_stay(write, tmp_path: Path, monkeypatch) -> None:
    path = write(MINIMAL)
    monkeypatch.chdir("/")
    recipe = load_recipe(path)
    assert recipe.data.train_dataset[0].path == str(tmp_path / "train.jsonl")
    assert recipe.model.model_name_or_path == "some/model"
    (tmp_path / "some" / "model").mkdir(parents=True)
    (tmp_path / "some" / "model" / "config.json").write_text("{}")
    assert load_recipe(path).model.model_name_or_path == str(tmp_path / "some" / "model")


@pytest.mark.parametrize(
    ("raw", "value"), [("2e-5", 2e-5), ("2.5E-4", 2.5e-4), ("1", 1.0), ("0.1", 0.1), ("'3e-4'", 3e-4)]
)
def test_numbers_are_numbers_with_or_without_a_dot(write, raw: str, value: float) -> None:
    assert load_recipe(write(MINIMAL + f"  learning_rate: {raw}\n")).training.learning_rate == value
    assert load_recipe(write(MINIMAL), [f"training.learning_rate={raw}"]).training.learning_rate == value


def test_the_last_override_wins_and_may_open_a_section(write) -> None:
    recipe = load_recipe(write(MINIMAL), ["gate.enabled=true", "gate.enabled=false", "gate.places=[a_step]"])
    assert recipe.gate.enabled is False
    assert recipe.gate.places == ["a_step"]


def test_every_finding_is_reported_at_once_with_its_line_and_the_nearest_key(write) -> None:
    path = write(MINIMAL + "  learning_rat: 1e-4\n  max_length: many\ngates:\n  enabled: true\n")
    error = refusal(path, "adapter.rank=8")
    assert error.exit_code == 2
    for part in (
        f"unknown key `training.learning_rat`; did you mean `learning_rate`? ({path} line 7)",
        f"`training.max_length`: input should be a valid integer, unable to parse string as an integer, got 'many' "
        f"({path} line 8)",
        f"unknown key `gates`; did you mean `gate`? ({path} line 9)",
        "unknown key `adapter.rank`; folora-q calls it `adapter.r` (override 'adapter.rank=8')",
    ):
        assert part in error.message
    assert error.message.count("\n") == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {model_name_or_path: x}\nmodel: {}\n", "the key 'model' stands here twice"),
        ("model: [\n", "is not valid YAML"),
        ("- a\n", "must hold sections"),
        ("!!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ("data: {train_dataset: train.jsonl}\ntraining: {output_dir: x}\n", "`model` is required"),
        (MINIMAL.replace("train.jsonl", "gone.jsonl"), "`data.train_dataset.path`: no file at"),
        (MINIMAL + "  learning_rate: .nan\n", "`training.learning_rate`"),
        (MINIMAL + "  learning_rate: 0\n", "`training.learning_rate`: input should be greater than 0"),
        (MINIMAL + "gate:\n  rule: spectral\n", "rule spectral leaves B to AdamW"),
        (MINIMAL + "gate: {rule: spectral, places: [a_start]}\n", "rule spectral needs a_step"),
        (MINIMAL + "  optim: sgd\ngate: {rule: spectral, places: [a_step]}\n", "training.optim: adamw_torch, not"),
    ],
)
def test_bad_recipes_are_refused_with_a_sentence(write, text: str, message: str) -> None:
    assert message in refusal(write(text)).message


@pytest.mark.parametrize("override", ["training.learning_rate", ".x=1", "=1", "training.=1", ""])
def test_bad_overrides_are_refused(write, override: str) -> None:
    assert f"cannot read the override {override!r}" in refusal(write(MINIMAL), override).message


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    assert f"no recipe at {tmp_path / 'gone.yaml'}" in refusal(tmp_path / "gone.yaml").message


def test_the_papers_gate_is_a_recipe(write) -> None:
    paper = ["gate.rule=spectral", "gate.gate_lambda=1", "gate.floor=0.3", "gate.places=[a_start,a_step]"]
    assert load_recipe(write(MINIMAL), paper).gate.floor == 0.3


def test_the_reference_page_is_the_schema() -> None:
    docs = Path(__file__).parents[2] / "docs"
    namespace: dict[str, object] = {"__name__": "reference", "__file__": str(docs / "make_recipe_reference.py")}
    exec(compile((docs / "make_recipe_reference.py").read_text("utf-8"), "reference", "exec"), namespace)
    assert (docs / "recipe.md").read_text("utf-8") == namespace["reference"](), (
        "run: .venv/bin/python docs/make_recipe_reference.py"
    )
