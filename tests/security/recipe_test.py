"""A recipe is data: it builds nothing, ends soon, takes nothing from the environment, and holds no secret."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from folora_q.errors import UserError
from folora_q.recipe import load_recipe
from tests.security.hostile import run

TOKEN = "hf_" + "abcDEF123" * 4
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
SLOW = {
    "aliases": BOMB,
    "a long line": "a: " + "x" * 10_000_000,
    "as many as are read": "a: [" + "x," * 32_000 + "x]",
    "many keys": "".join(f"k{n}: 1\n" for n in range(6_000)),
    "anchors": "".join(f"k{n}: &a{n} 1\n" for n in range(4_000)),
    "brackets": "[" * 60_000,
    "dashes": "- " * 30_000,
    "questions": "? " * 30_000,
    "documents": "---\n" * 15_000,
    "escapes": 'a: "' + "\\x41" * 15_000 + '"',
    "tags": "!!python/object/apply:os.system [true]\n" * 1_000,
}


@pytest.fixture(scope="module")
def longest() -> float:
    """Seconds of the processor that the YAML library takes for as long a text as is read."""
    began = time.process_time()
    yaml.safe_load(SLOW["as many as are read"])
    return time.process_time() - began


@pytest.mark.parametrize("content", SLOW.values(), ids=SLOW)
def test_what_is_made_to_take_time_is_refused_soon(content: str, tmp_path: Path, longest: float) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    began = time.process_time()
    with pytest.raises(UserError):
        load_recipe(path)
    assert time.process_time() - began < 3 * longest


def test_a_recipe_without_an_end_is_not_read_to_it() -> None:
    with pytest.raises(UserError, match=r"no recipe|65,537 characters|special characters"):
        load_recipe(Path("/dev/zero"))


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir [{mark}]", "!!python/object/new:os.mkdir [{mark}]", "!!python/name:os.mkdir"],
)
@pytest.mark.parametrize("place", ["override", "file"])
def test_no_object_is_built(tag: str, place: str, recipe_file: Path, tmp_path: Path, capfd) -> None:
    value = tag.format(mark=tmp_path / "ran")
    if place == "file":
        recipe_file.write_text(recipe_file.read_text() + f"\nexport: {value}\n")
        assert run("validate", recipe_file) == 2
    else:
        assert run("validate", recipe_file, f"training.output_dir={value}") == 2
    assert "could not determine a constructor for the tag" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_the_environment_stays_where_it_is(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for text in ("$HOME", "${HOME}", "%HOME%", "{{ env.HOME }}", "$(id)", "`id`"):
        recipe = load_recipe(recipe_file, [f"logging.run_name='{text}'", f"training.output_dir='{text}/run'"])
        assert (recipe.logging.run_name, recipe.training.output_dir) == (text, f"{text}/run")
        assert run("validate", recipe_file, f"data.train_dataset='{text}/train.jsonl'") == 2
        assert "no file at" in (said := capfd.readouterr().err) and text in said
    # A ~ at the beginning of a path is asked for by whoever wrote it; elsewhere it is a character.
    (tmp_path / "home").mkdir()
    (tmp_path / "train.jsonl").rename(tmp_path / "home" / "train.jsonl")
    recipe = load_recipe(recipe_file, ["data.train_dataset=~/train.jsonl", "logging.run_name=~/x"])
    assert recipe.data.train_dataset[0].path == str(tmp_path / "home" / "train.jsonl")
    assert recipe.logging.run_name == "~/x"


@pytest.mark.parametrize("name", ["../secret", "../secret.txt", "{root}/secret.txt", "chatml/../../x", ".", "a\\b"])
def test_a_template_is_a_template(name: str, recipe_file: Path, tmp_path: Path, capfd) -> None:
    for path in (tmp_path / "secret", tmp_path / "secret.txt"):
        path.write_text("secret")
    assert run("validate", recipe_file, f"data.chat_template='{name.format(root=tmp_path)}'") == 2
    said = capfd.readouterr().err
    assert ".jinja" in said and ("is not a template" in said or "there is no template named" in said)


@pytest.mark.parametrize(
    "name", ["https://user:pass@host/model", "git+ssh://host/x", "a/b/c", "hub:x/y", "\\\\host\\share", "a b", "a/../b"]
)
def test_a_model_is_a_path_or_a_hub_id(name: str, recipe_file: Path, capfd) -> None:
    assert run("validate", recipe_file, f"model.model_name_or_path='{name}'") == 2
    assert "pass@" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "setting",
    [
        "export.base_model_name_or_path=https://ada:correct-horse@host/model",
        f"logging.run_name={TOKEN}",
        "logging.run_name=run-of-a-key-in-the-environment",
        f"data.train_dataset=https://host/rows.jsonl?token={TOKEN}",
        f"training.output_dir=runs/{TOKEN}",
        f"data.train_dataset={{path: a/b, revision: {TOKEN}}}",
    ],
)
def test_a_recipe_with_a_secret_is_refused_and_not_repeated(
    setting: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setenv("COMET_API_KEY", "a-key-in-the-environment")
    for command in (("validate", recipe_file), ("train", recipe_file), ("train", recipe_file, "--dry-run")):
        assert run(*command, setting) == 2
        out, err = capfd.readouterr()
        assert "holds a token or a password" in err
        assert not {secret for secret in (TOKEN, "correct-horse", "a-key-in-the") if secret in out + err}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["hf_models", "runs/hf_transfer_enabled", "hf_" + "a" * 12, "https://host/a", "a@b.c"])
def test_names_that_only_begin_alike_are_none(name: str, recipe_file: Path) -> None:
    assert load_recipe(recipe_file, [f"logging.run_name='{name}'"]).logging.run_name == name


def test_validate_shows_every_file_that_a_recipe_names(recipe_file: Path, tmp_path: Path, capfd) -> None:
    files = ["t.jinja", "prose.txt", "more.txt", "asked.txt", "score.py"]
    for name in files:
        (tmp_path / name).write_text("{{ messages }}")
    settings = [
        "data.chat_template=t.jinja",
        "evaluation.general_text=[prose.txt, more.txt]",
        "evaluation.general_prompts=asked.txt",
        "evaluation.metric=function",
        f"evaluation.metric_function={tmp_path / 'score.py'}:score",
    ]
    assert run("validate", recipe_file, *settings) == 0
    shown = capfd.readouterr().out
    assert all(str(tmp_path / name) in shown for name in [*files, "train.jsonl", "heldout.jsonl"])
