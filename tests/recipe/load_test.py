from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from folora_q.errors import UserError
from folora_q.recipe import load_recipe
from folora_q.recipe.gate_rules import GATE_RULES, PLAIN_LEARNING_RATE

FROZEN = (GATE_RULES["frozen"].ridge, GATE_RULES["frozen"].utility_ridge)
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
        f"`training.max_length` must be an integer, not 'many' ({path} line 8)",
        f"unknown key `gates`; did you mean `gate`? ({path} line 9)",
        "unknown key `adapter.rank`; folora-q calls it `adapter.r` (override 'adapter.rank=8')",
    ):
        assert part in error.message
    assert error.message.count("\n") == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {model_name_or_path: x}\nmodel: {}\n", "the key 'model' appears twice"),
        ("model: [\n", "is not valid YAML"),
        ("- a\n", "must hold sections"),
        ("!!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ("data: {train_dataset: train.jsonl}\ntraining: {output_dir: x}\n", "`model` is required"),
        (MINIMAL.replace("train.jsonl", "gone.jsonl"), "`data.train_dataset.path`: no file at"),
        (MINIMAL + "  learning_rate: .nan\n", "`training.learning_rate`"),
        (MINIMAL + "  learning_rate: 0\n", "`training.learning_rate` must be above 0, not 0"),
        (MINIMAL + "gate: {rule: spectral, places: [a_step, b_step]}\n", "rule spectral leaves B to AdamW"),
        (MINIMAL + "gate: {rule: spectral, places: [a_start]}\n", "rule spectral needs a_step"),
        (MINIMAL + "gate: {rule: step, places: [a_start]}\n", "rule step gates no step with these gate.places"),
        (MINIMAL + "gate: {places: [a_start, a_step]}\n", "rule frozen does not train A"),
        (
            MINIMAL + "gate: {start: random, places: [a_start, b_step]}\n",
            "A's rows have no quotients by which to gate B's steps",
        ),
        (MINIMAL + "gate: {gate_lambda: 16}\n", "without gate.gate_lambda: set gate.rule to step"),
        (MINIMAL + "gate: {sharpness: 2}\n", "without gate.sharpness: set gate.rule to step"),
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


@pytest.mark.parametrize(
    ("overrides", "rate", "rank"),
    [
        ([], GATE_RULES["frozen"].learning_rate, 64),
        (["gate.rule=step"], GATE_RULES["step"].learning_rate, 64),
        (["gate.rule=spectral"], GATE_RULES["spectral"].learning_rate, 64),
        (["gate.enabled=false"], PLAIN_LEARNING_RATE, 64),
        (["gate.enabled=false", "training.learning_rate=0.5"], 0.5, 64),
        (["adapter.r=32"], GATE_RULES["frozen"].learning_rate, 64),
        (["adapter.r=48"], GATE_RULES["frozen"].learning_rate, 96),
        (["adapter.r=48", "gate.rank=8"], GATE_RULES["frozen"].learning_rate, 8),
    ],
)
def test_rate_and_rank_follow_the_rule_and_the_adapter_unless_they_are_given(
    write, overrides: list[str], rate: float, rank: int
) -> None:
    recipe = load_recipe(write(MINIMAL), overrides)
    assert (recipe.training.learning_rate, recipe.gate.rank) == (rate, rank)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], None),
        (["training.learning_rate=1e-3"], None),
        (["training.learning_rate=2e-4"], "learning_rate 0.0002 is far from 0.002, .*: with it little is learned"),
        (["training.learning_rate=0.01"], "learning_rate 0.01 is far from 0.002, .*: with it much is forgotten"),
        (["training.learning_rate=2e-4", "gate.enabled=false"], None),
        (["training.learning_rate=2e-4", "gate.rule=step"], None),
        (["training.learning_rate=2e-4", "gate.places=[a_start]"], None),
        (["training.learning_rate=2e-4", "gate.covariance=activation"], None),
    ],
)
def test_a_rate_of_another_method_is_told(write, overrides: list[str], told: str | None) -> None:
    advice = load_recipe(write(MINIMAL), overrides).rate_advice
    assert advice is None if told is None else re.search(told, advice)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.r=256"], None),
        (["adapter.r=256", "gate.rank=128"], None),
        (
            ["adapter.r=48", "gate.rank=8"],
            "rank 8 keeps 16 directions for an adapter of rank 48, whose other 32 rows stay zero",
        ),
        (
            ["adapter.r=48", "gate.rank=8", "gate.rule=step"],
            "other 32 rows start in random directions: remove gate.rank, .* 96",
        ),
        (["adapter.r=48", "gate.rank=8", "gate.enabled=false"], None),
        (["adapter.r=48", "gate.rank=8", "gate.start=random"], None),
    ],
)
def test_an_adapter_with_more_rows_than_directions_is_told_of(write, overrides: list[str], message: str | None) -> None:
    recipe = load_recipe(write(MINIMAL), overrides)
    assert recipe.rank_advice is None if message is None else re.search(message, recipe.rank_advice or "")
    assert recipe.rank_advice is None or recipe.rank_advice in recipe.advice


@pytest.mark.parametrize(
    ("gate", "places", "ridges"),
    [
        ("{}", ["a_start", "b_step"], FROZEN),
        ("{rule: step}", ["a_start", "a_step", "b_step"], (0.01, 0.01)),
        ("{rule: step, places: [b_step], utility_ridge: 0}", ["b_step"], (0.01, 0.0)),
        ("{rule: spectral}", ["a_start", "a_step"], (0.01, 0.01)),
        ("{places: [a_start]}", ["a_start"], FROZEN),
        ("{start: random, gate_lambda: 16}", ["a_start"], FROZEN),
        ("{rule: frozen, ridge: 0.2}", ["a_start", "b_step"], (0.2, FROZEN[1])),
        ("{enabled: false, gate_lambda: 16}", ["a_start", "b_step"], FROZEN),
    ],
)
def test_places_and_ridges_are_the_rules_unless_they_are_given(
    write, gate: str, places: list[str], ridges: tuple[float, float]
) -> None:
    section = load_recipe(write(MINIMAL + f"gate: {gate}\n")).gate
    assert section.places == places and (section.ridge, section.utility_ridge) == ridges


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


def test_an_override_may_leave_out_a_section_that_is_the_only_one_with_its_key(write) -> None:
    recipe = load_recipe(write(MINIMAL), ["learning_rate=2e-5", "r=8", "training.max_steps=3"])
    assert (recipe.training.learning_rate, recipe.adapter.r, recipe.training.max_steps) == (2e-5, 8, 3)
    assert (
        "could be proxy.batch_size or gate.batch_size or evaluation.batch_size"
        in refusal(write(MINIMAL), "batch_size=2").message
    )
    assert (
        "`lerning_rate` in an override; did you mean `learning_rate`?"
        in refusal(write(MINIMAL), "lerning_rate=1").message
    )
    assert "folora-q calls it `training.max_length`" in refusal(write(MINIMAL), "cutoff_len=1").message


def test_an_override_reaches_into_a_source(write, tmp_path: Path) -> None:
    recipe = load_recipe(write(MINIMAL), ["data.train_dataset.weight=2", "data.train_dataset.fields.prompt=question"])
    (source,) = recipe.data.train_dataset
    assert (source.path, source.weight, source.fields) == (str(tmp_path / "train.jsonl"), 2, {"prompt": "question"})
    assert "is not a mapping" in refusal(write(MINIMAL), "model.model_name_or_path.x=1").message


def test_paths_in_overrides_are_looked_for_here_and_then_beside_the_recipe(write, tmp_path: Path, monkeypatch) -> None:
    path, here = write(MINIMAL), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "mine.jsonl").write_text("{}\n")
    for override, found in (("mine.jsonl", here / "mine.jsonl"), ("train.jsonl", tmp_path / "train.jsonl")):
        assert load_recipe(path, [f"data.train_dataset={override}"]).data.train_dataset[0].path == str(found)
    (here / "train.jsonl").write_text("{}\n")
    assert load_recipe(path, ["data.train_dataset=train.jsonl"]).data.train_dataset[0].path == str(here / "train.jsonl")
    assert load_recipe(path).data.train_dataset[0].path == str(tmp_path / "train.jsonl")
    assert str(here / "gone.jsonl") in refusal(path, "data.train_dataset=gone.jsonl").message


def test_a_glob_needs_no_quotes_in_an_override(write, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(write(MINIMAL), ["data.train_dataset=*.jsonl"]).data.train_dataset[0].path.endswith("*.jsonl")


def test_sources_are_told_in_each_way_and_are_the_same(write, tmp_path: Path) -> None:
    ways = ["train.jsonl", "{path: train.jsonl}", "[train.jsonl]", "[{path: train.jsonl}]"]
    recipes = [load_recipe(write(MINIMAL.replace("train.jsonl", way))) for way in ways]
    assert all(recipe == recipes[0] for recipe in recipes)


def test_a_flat_configuration_of_another_tool_is_answered_word_by_word(write) -> None:
    text = "base_model: x\nmicro_batch_size: 2\nlearning_rate: 1e-4\nadapter: qlora\nload_in_4bit: true\n"
    lines = refusal(write(text)).message.splitlines()
    for number, part in enumerate(
        [
            "unknown key `base_model`; folora-q calls it `model.model_name_or_path`",
            "unknown key `micro_batch_size`; folora-q calls it `training.per_device_train_batch_size`",
            "unknown key `learning_rate`; it belongs in the section `training`",
            "`adapter` must be a section with keys of its own, not 'qlora'; folora-q always trains a LoRA adapter",
            "unknown key `load_in_4bit`; leave it out: the base is always loaded in 4 bits",
        ],
        start=1,
    ):
        (line,) = [line for line in lines if part in line]
        assert f"line {number})" in line


def test_a_value_that_is_none_of_a_few_is_answered_with_the_nearest(write) -> None:
    message = refusal(write(MINIMAL + "  optim: paged_adamw\n")).message
    assert "`training.optim` cannot be 'paged_adamw': it is one of auto, adamw_torch, " in message
    assert "did you mean paged_adamw_8bit?" in message
    nested = "data:\n  train_dataset:\n    path: train.jsonl\n    fields: {promt: q}\n    roles: {x: usr}\n"
    message = refusal(write(MINIMAL.replace("data:\n  train_dataset: train.jsonl\n", nested))).message
    assert "`data.train_dataset.fields.promt` cannot be 'promt'" in message and "did you mean prompt?" in message
    assert "`data.train_dataset.roles.x` cannot be 'usr'" in message and "line 7)" in message


def test_a_long_value_is_not_quoted_whole(write) -> None:
    assert len(refusal(write(MINIMAL + f"  max_length: {'x' * 10_000_000}\n")).message) < 500


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./gone", "no model at"),
        ("gone.gguf", "no model at"),
        ("empty", "has no config.json"),
        ("train.jsonl", "is a file, but not a .gguf file"),
    ],
)
def test_a_local_model_is_looked_for_before_a_run(write, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    assert message in refusal(write(MINIMAL.replace("some/model", name))).message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("trian.jsonl", "did you mean train.jsonl?"),
        ("'*.csv'", "no file matches"),
        ("org/name.jsonl", "no file at"),
        ("a/b/c", "no file at"),
        ("name", "no file at"),
        ("'" + "x" * 5000 + "'", "no file at"),
        ('"a\\0b"', "`data.train_dataset.path`"),
        ("''", "`data.train_dataset.path`"),
        ("[]", "`data.train_dataset`"),
    ],
)
def test_data_that_are_not_there_are_found_before_a_run(write, path: str, message: str) -> None:
    assert message in refusal(write(MINIMAL.replace("train.jsonl", path))).message


def test_every_missing_file_is_named_at_once(write) -> None:
    path = write(MINIMAL + "evaluation: {general_text: gone.txt}\n")
    message = refusal(path, "data.eval_dataset=gone.jsonl", "data.chat_template=gone.jinja").message
    assert message.count("no file at") == 3
    assert f"`evaluation.general_text`: no file at {path.parent / 'gone.txt'} ({path} line 7)" in message


def test_trackers_may_be_named_in_each_way(write, monkeypatch) -> None:
    monkeypatch.setattr("folora_q.recipe.resolve.find_spec", lambda name: object())
    for written, found in (("none", []), ("[]", []), ("wandb", ["wandb"]), ("[wandb, mlflow]", ["wandb", "mlflow"])):
        assert load_recipe(write(MINIMAL + f"logging: {{report_to: {written}}}\n")).logging.report_to == found


def test_the_best_step_needs_steps_that_are_measured_and_saved(write) -> None:
    best = ["training.load_best_model_at_end=true"]
    assert "set evaluation.steps" in refusal(write(MINIMAL), *best).message
    assert (
        "a multiple of evaluation.steps (20)"
        in refusal(write(MINIMAL), *best, "evaluation.steps=20", "training.save_steps=30").message
    )
    assert load_recipe(write(MINIMAL), [*best, "evaluation.steps=20", "training.save_steps=40"])
