"""What `validate`, `estimate` and `train` find of a base model before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands_test import run
from tests.conftest import save_tiny_model, write_recipe

MORE = ["<|more_0|>", "<|more_1|>"]


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


@pytest.fixture
def recipe(tmp_path: Path, own_model: Path) -> Path:
    return write_recipe(tmp_path, own_model)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("command", ["validate", "estimate", "train"])
def test_a_quantized_base_is_refused_with_the_line_and_what_to_use(
    command: str, recipe: Path, own_model: Path, capfd
) -> None:
    held = {"quant_method": "awq", "bits": 4}
    change(own_model / "config.json", quantization_config=held, _name_or_path="org/Model-7B")
    assert run(command, recipe) == 2
    talk = capfd.readouterr().err
    line = next(n for n, text in enumerate(recipe.read_text().splitlines(), 1) if "model_name_or_path" in text)
    assert f"is already quantized by AWQ, and folora-q quantizes 16-bit weights itself ({recipe} line {line})" in talk
    assert "use the 16-bit original that its config.json names: org/Model-7B" in talk


@pytest.mark.parametrize("command", ["validate", "estimate", "train"])
def test_a_misspelt_layer_is_found_with_its_line(command: str, recipe: Path, capfd) -> None:
    text = recipe.read_text().replace("adapter:\n", "adapter:\n  target_modules:\n  - q_porj\n  - v_proj\n", 1)
    recipe.write_text(text)
    line = next(n for n, each in enumerate(text.splitlines(), 1) if "q_porj" in each)
    assert run(command, recipe) == 2
    assert "no linear layer q_porj (did you mean q_proj?); its linear layers are q_proj" in (
        talk := capfd.readouterr().err
    )
    assert f"({recipe} line {line})" in talk and not (recipe.parent / "run").exists()


def test_the_layers_of_a_model_that_is_in_no_table_are_known_too(recipe: Path, own_model: Path, capfd) -> None:
    change(own_model / "config.json", model_type="olmo", architectures=["OlmoForCausalLM"])
    assert run("validate", recipe, "target_modules=[att_proj]") == 2
    assert "no linear layer att_proj" in (talk := capfd.readouterr().err) and "q_proj, k_proj" in talk
    assert run("validate", recipe, "target_modules=[q_proj]") == 0
    change(own_model / "config.json", model_type="newest")
    assert run("validate", recipe, "target_modules=[att_proj]") == 0
    assert "names of its layers are not known before it is loaded" in " ".join(capfd.readouterr().out.split())


def test_rotary_positions_are_a_note_and_a_table_of_positions_an_error(recipe: Path, own_model: Path, capfd) -> None:
    assert run("validate", recipe, "max_length=512") == 0
    assert "was trained for" not in capfd.readouterr().out
    assert run("validate", recipe, "max_length=600") == 0
    noted = "training.max_length is 600, but the model was trained for 512 tokens"
    assert noted in capfd.readouterr().out
    gpt2 = {"model_type": "gpt2", "vocab_size": 261, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    (own_model / "config.json").write_text(json.dumps(gpt2))
    assert run("validate", recipe, "max_length=600", "proxy.max_new_tokens=513") == 2
    talk = capfd.readouterr().err
    assert (
        "`training.max_length` is 600, but the model has a table of positions for 512 tokens, and fails on more" in talk
    )
    assert "`proxy.max_new_tokens` is 513" in talk and "(override 'max_length=600')" in talk
    assert run("validate", recipe, "max_length=512") == 0


def add_tokens(folder: Path, **settings: object) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(MORE)
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def test_a_token_beyond_the_embedding_is_a_note_until_a_row_holds_it(recipe: Path, own_model: Path, capfd) -> None:
    add_tokens(own_model)
    assert run("validate", recipe) == 0
    assert (
        "the tokens <|more_0|> (261), <|more_1|> (262) have no row in the model's embedding" in capfd.readouterr().out
    )
    rows = (recipe.parent / "train.jsonl").read_text().replace("it is 3", "it is <|more_1|>")
    (recipe.parent / "train.jsonl").write_text(rows)
    wanted = f"{recipe.parent / 'train.jsonl'} line 4: the model's embedding has 261 rows, none of them for the token "
    for command in ("validate", "train"):
        assert run(command, recipe) == 2
        talk = capfd.readouterr().err
        assert wanted + "<|more_1|> (262): resize it" in talk


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": MORE[0]},
        {"pad_token": MORE[0]},
        {"chat_template": "{% for m in messages %}<|more_0|>{% endfor %}"},
    ],
)
def test_a_token_beyond_the_embedding_that_every_text_has_is_an_error(
    recipe: Path, own_model: Path, capfd, settings: dict
) -> None:
    add_tokens(own_model, **settings)
    assert run("validate", recipe) == 2
    assert "none of them for the token <|more_0|> (261)" in capfd.readouterr().err


def test_a_model_of_the_hub_that_is_not_here_is_not_looked_at(recipe: Path, capfd) -> None:
    assert run("validate", recipe, "model.model_name_or_path=org/nothing-here", "target_modules=[q_porj]") == 0
    assert "the files of org/nothing-here are not in the hub's cache, so the model was not checked" in (
        capfd.readouterr().out
    )


def test_a_model_whose_numbers_are_shipped_is_checked_by_them(recipe: Path, capfd) -> None:
    name = "model.model_name_or_path=Qwen/Qwen2.5-7B-Instruct"
    for command in ("validate", "estimate"):
        assert run(command, recipe, name, "target_modules=[q_proj]") == 0
        assert "in the hub's cache: shipped numbers are used (" in " ".join(capfd.readouterr().out.split())
        assert run(command, recipe, name, "target_modules=[q_porj]") == 2
        assert "no linear layer q_porj" in capfd.readouterr().err


def test_nothing_heavy_is_imported_for_it(recipe: Path, own_model: Path) -> None:
    add_tokens(own_model)
    code = (
        "from folora_q.cli.app import main\n"
        f"try: main(['validate', {str(recipe)!r}, 'target_modules=[q_proj]', 'modules_to_save=[embed_tokens]'])\n"
        "except SystemExit as end: assert not end.code\n"
        "import sys\nfound = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\nassert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
