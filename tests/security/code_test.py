"""Python that comes with a model runs with --trust-remote-code, and by nothing else: no recipe, no question asked."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch

from folora_q.errors import UserError
from folora_q.models.hardware import choose_hardware
from folora_q.models.layout import quantized_parameters
from folora_q.models.load import load_model, require_packable
from folora_q.models.meta import parameter_shapes
from folora_q.models.quantization import Quantization
from folora_q.models.tokenizer import load_tokenizer
from folora_q.models.trust import Trust
from folora_q.recipe.schema import ModelSection
from tests.conftest import write_recipe
from tests.security.hostile import coded_model, coded_tokenizer, edit_json, run

FLAG = "--trust-remote-code"


@pytest.fixture(autouse=True)
def nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own way is to ask on the terminal, for fifteen seconds."""

    def ask(*_: object) -> str:
        raise AssertionError("it asked")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def coded(tiny_folder: Path, tmp_path: Path, mark: Path) -> Path:
    return coded_model(tiny_folder, tmp_path / "coded", mark)


@pytest.fixture
def adapter_on_coded(tiny_adapter: Path, coded: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(coded))
    return folder


def test_without_the_flag_no_command_runs_it(coded: Path, adapter_on_coded: Path, mark: Path, capfd) -> None:
    recipe = write_recipe(coded.parent, coded)
    commands = [
        ("train", recipe),
        ("chat", coded, "--prompt", "hi"),
        ("chat", adapter_on_coded, "--prompt", "hi"),
        ("eval", adapter_on_coded),
        ("eval", coded, "--against", coded),
        ("merge", adapter_on_coded),
    ]
    for command in commands:
        assert run(*command) == 2, command
        said = capfd.readouterr().err
        assert f"{coded} can only be loaded by running Python code that comes with it" in said, command
        assert f"add {FLAG}" in said
    assert not (coded.parent / "run").exists(), "it was found before a run was begun"
    assert run("estimate", recipe) == 2 and "knows no model of the type" in capfd.readouterr().err
    assert run("preview", recipe) == 0  # its tokenizer is none of its own
    assert not mark.exists()


def test_a_recipe_cannot_allow_it(recipe_file: Path, capfd) -> None:
    assert run("train", recipe_file, "model.trust_remote_code=true") == 2
    assert "the option --trust-remote-code of the command: a recipe alone cannot run code" in capfd.readouterr().err


def test_with_the_flag_it_is_trained_merged_and_talked_to(own_modules: None, coded: Path, mark: Path, capfd) -> None:
    recipe = write_recipe(coded.parent, coded)
    output = coded.parent / "run"
    settings = ["training.max_steps=3", "gate.enabled=false", "evaluation.metric=none", "evaluation.num_answers=1"]
    assert run("train", recipe, *settings, FLAG) == 0
    assert mark.read_text().splitlines()[0] == "model"
    assert json.loads((output / "run.json").read_text("utf-8"))["allowed"] == [FLAG]
    shown = capfd.readouterr().out
    assert f"chat {output} --base {FLAG}" in shown and f"merge {output} {FLAG}" in shown
    assert run("chat", output, "--prompt", "hi") == 2, "a run does not remember that it was allowed"
    assert run("merge", output, FLAG, "--base", "original") == 0
    assert (output / "merged" / "mine.py").is_file()
    assert run("chat", output / "merged", "--prompt", "hi", "--max-new-tokens", "4", FLAG) == 0


def test_a_tokenizer_of_its_own_code_is_none_either(
    own_modules: None, tiny_folder: Path, tmp_path: Path, mark: Path, capfd
) -> None:
    folder = coded_tokenizer(tiny_folder, tmp_path / "coded", mark)
    section = ModelSection(model_name_or_path=str(folder))
    for command in (("preview", write_recipe(tmp_path, folder)), ("chat", folder, "--prompt", "hi")):
        assert run(*command) == 2
        assert f"{folder} can only be loaded by running Python code" in capfd.readouterr().err
    assert not mark.exists()
    load_tokenizer(section, trust=Trust(remote_code=True))
    assert mark.read_text() == "tokenizer\n"


def test_the_parts_that_read_a_configuration_do_not_run_it(coded: Path, mark: Path) -> None:
    section = ModelSection(model_name_or_path=str(coded))
    with pytest.raises(UserError, match="running Python code"):
        require_packable(section)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        quantized_parameters(coded, Quantization())
    # A type that transformers has, but not as a causal language model: it would ask for this one too.
    named = {"model_type": "clip", "auto_map": {"AutoModelForCausalLM": "mine.MineModel"}, "_name_or_path": str(coded)}
    with pytest.raises(UserError, match="cannot build"):
        parameter_shapes(named)
    assert not mark.exists()


def test_where_transformers_has_the_model_its_own_code_is_left_alone(coded: Path, mark: Path) -> None:
    edit_json(coded / "config.json", model_type="llama")
    loaded = load_model(ModelSection(model_name_or_path=str(coded)), choose_hardware("float32"))
    assert type(loaded.model).__module__.startswith("transformers.models.llama") and not mark.exists()


def test_a_way_to_generate_that_comes_with_a_model_is_not_taken(tiny_folder: Path, tmp_path: Path, mark: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "custom_generate").mkdir()
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\ndef generate(model, *a, **k): ...\n"
    (folder / "custom_generate" / "generate.py").write_text(code)
    loaded = load_model(ModelSection(model_name_or_path=str(folder)), choose_hardware("float32"))
    loaded.model.generate(torch.tensor([[5]]), max_new_tokens=1)
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": {"": "somebody/kernel"}},
        {"text_config": {"experts_implementation": "somebody/kernel@main:forward"}},
    ],
)
def test_compiled_code_that_a_configuration_names_is_not_fetched(
    change: dict, tiny_folder: Path, tmp_path: Path, capfd
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    edit_json(folder / "config.json", **change)
    assert run("train", write_recipe(tmp_path, folder)) == 2
    assert "asks for compiled code from a hub: somebody/kernel" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("megatron_config", {"hidden_size": 1}),
        ("shadow_model", "somebody/model"),
        ("adapters", {"a": "/elsewhere"}),
        ("prompt_tuning_init_state_dict_path", "/elsewhere/weights.bin"),
    ],
)
def test_an_adapter_that_names_code_or_files_elsewhere_is_refused(
    key: str, value: object, tiny_adapter: Path, tmp_path: Path, capfd
) -> None:
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    edit_json(folder / "adapter_config.json", **{key: value})
    for command in (("chat", folder, "--prompt", "hi"), ("eval", folder), ("merge", folder)):
        assert run(*command) == 2
        assert f"adapter_config.json sets {key}, which names code or files" in capfd.readouterr().err


def test_llama_cpps_converter_gets_no_model_that_names_code(
    coded: Path, tiny_adapter: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """It loads tokenizers with all trust; the model is one that we load without its code."""
    edit_json(coded / "config.json", model_type="llama")
    ran = tmp_path / "converted"
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    command = ("merge", tiny_adapter, "--base-model", coded, "--gguf", "f32", "--output", tmp_path / "merged")
    assert run(*command, "--converter", script) == 2
    assert "converter runs Python that comes with a model" in capfd.readouterr().err
    assert not ran.exists() and not (tmp_path / "merged").exists()
