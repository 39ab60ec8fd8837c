"""K-quants: the program is looked for, run and checked; with the real llama-quantize where there is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig, LlamaForCausalLM

from folora_q.errors import RunError, UserError
from folora_q.export import gguf as export
from folora_q.export.gguf import write_gguf
from folora_q.export.gguf_quantized import MAX_RELATIVE_ERROR, check_quantized
from folora_q.export.gguf_types import K_QUANTS
from folora_q.export.llama_quantize import INSTALL, GgufTools, find_quantizer, write_k_quant
from tests.conftest import save_tiny_model, tiny_tokenizer
from tests.export.gguf_test import CONVERTER, program
from tests.export.quantizer import save_quantizer


@pytest.fixture
def tools(tmp_path: Path) -> GgufTools:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER, encoding="utf-8")
    return GgufTools([sys.executable, str(script)], save_quantizer(tmp_path / "bin"))


def test_the_quantizer_is_looked_for_in_order(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("LLAMA_CPP_DIR", "LLAMA_QUANTIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="llama-quantize was not found on PATH") as caught:
        find_quantizer(None)
    assert caught.value.hint == INSTALL and "q8_0 and f16 do not need it" in INSTALL
    on_path = program(tmp_path / "bin" / "llama-quantize")
    assert find_quantizer(None) == on_path
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "llama.cpp"))
    assert find_quantizer(None) == on_path, "a clone that was not built"
    built = program(tmp_path / "llama.cpp" / "build" / "bin" / "llama-quantize")
    assert find_quantizer(None) == built
    variable = program(tmp_path / "variable")
    monkeypatch.setenv("LLAMA_QUANTIZE", str(variable))
    assert find_quantizer(None) == variable
    assert find_quantizer(built) == find_quantizer(built.parent) == built
    with pytest.raises(UserError, match=f"there is no llama-quantize at {tmp_path / 'gone'}"):
        find_quantizer(tmp_path / "gone")
    variable.chmod(0o644)
    with pytest.raises(UserError, match="variable is not executable"):
        find_quantizer(None)


@pytest.mark.parametrize("kind", ["q4_k_m", "q6_k"])
def test_a_model_is_quantized_and_every_tensor_compared(
    tiny_folder: Path, tmp_path: Path, tools: GgufTools, kind: str
) -> None:
    target = tmp_path / "out" / f"tiny-{kind}.gguf"
    facts = write_k_quant(tiny_folder, target, kind, tools)
    assert facts.types == {"Q5_0": 16, "F32": 6} and facts.compared == facts.tensors == 22
    assert (facts.architecture, facts.vocabulary, facts.chat_template) == ("llama", 261, True)
    assert facts.size == target.stat().st_size
    assert list(target.parent.iterdir()) == [target], "the 16-bit file is gone"


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        ("exit 1", "llama-quantize failed on .*: main: failed to quantize model"),
        ("no output", "llama-quantize ended without an error and wrote nothing"),
        ("garbage", "tiny.gguf cannot be read as a GGUF file"),
        ("architecture", "tiny.gguf is not the model that was quantized: general.architecture was changed"),
        ("vocabulary", "tokenizer.ggml.tokens was changed"),
        ("template", "tokenizer.chat_template was changed"),
        ("missing", "blk.1.ffn_up.weight is only in one of them"),
        ("norm", "norm.weight has other numbers, in the same type"),
        ("other numbers", r"blk.1.ffn_up.weight is off by 1[34]\d.\d% \(root mean square\), more than Q5_0 rounds"),
        ("shape", r"blk.1.ffn_up.weight has the shape \[128, 64\], not \[64, 128\]"),
        ("unknown type", "blk.1.ffn_up.weight is stored as MXFP4, which cannot be checked here"),
    ],
)
def test_what_is_not_the_model_is_named_and_not_put_in_place(
    tiny_folder: Path, tmp_path: Path, tools: GgufTools, monkeypatch, sabotage: str, message: str
) -> None:
    target = tmp_path / "out" / "tiny.gguf"
    target.parent.mkdir()
    target.write_bytes(b"what was there before")
    monkeypatch.setenv("SABOTAGE_QUANTIZER", sabotage)
    with pytest.raises(RunError, match=message) as caught:
        write_k_quant(tiny_folder, target, "q4_k_m", tools)
    assert caught.value.hint and f".{target.name}." not in caught.value.message
    assert target.read_bytes() == b"what was there before"
    assert list(target.parent.iterdir()) == [target]


def test_mistakes_of_the_user(tiny_folder: Path, tmp_path: Path, tools: GgufTools, monkeypatch) -> None:
    target = tmp_path / "tiny.gguf"
    with pytest.raises(UserError, match="q2_k is not a type that llama-quantize makes here"):
        write_k_quant(tiny_folder, target, "q2_k", tools)
    monkeypatch.setattr(export, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match="the GGUF file needs 0.0 GB"):
        write_k_quant(tiny_folder, target, "q4_k_m", tools)


def save_llama_of_256_columns(folder: Path) -> Path:
    """Rows that k-quants can store: their blocks have 256 numbers."""
    save_tiny_model(folder)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [*K_QUANTS])
def test_the_real_program_where_there_is_one(tmp_path: Path, tools: GgufTools, kind: str) -> None:
    try:
        real = GgufTools(tools.converter, find_quantizer(None))
    except UserError as error:
        pytest.skip(error.message)
    folder, target = save_llama_of_256_columns(tmp_path / "model"), tmp_path / "out" / f"{kind}.gguf"
    facts = write_k_quant(folder, target, kind, real)
    assert facts.types[f"Q{kind[1]}_K"] >= 4 and facts.compared == 22
    assert {Type[name] for name in facts.types} <= {*MAX_RELATIVE_ERROR, Type.F32}
    source = tmp_path / "source.gguf"
    other = save_tiny_model(tmp_path / "other")
    facts = write_gguf(other, source, "f16", real.converter)
    with pytest.raises(RunError, match="is not the model that was quantized"):
        check_quantized(target, source, facts, target)
