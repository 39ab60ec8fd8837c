"""The merged weights against float64 arithmetic, and all that goes with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from folora_q.errors import UserError
from folora_q.export import merge as merging
from folora_q.export.ends import fitted
from folora_q.export.merge import REPORT, Merge, write_merged
from folora_q.models.adapter_file import read_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.layout import quantized_parameters
from folora_q.models.load import load_model
from folora_q.models.quantization import Quantization
from folora_q.models.weight_files import INDEX, open_checkpoint
from folora_q.recipe.schema import ModelSection
from tests.export.models import save_adapter, sharded_llama, sharded_qwen

BASES = {
    "llama": lambda folder: sharded_llama(folder),
    "llama-tied": lambda folder: sharded_llama(folder, tied=True),
    "qwen": lambda folder: sharded_qwen(folder, tied=False),
    "qwen-tied": lambda folder: sharded_qwen(folder),
}
BF16 = torch.bfloat16


def merge_of(base: Path, *adapters: tuple[Path, float], weights: str = "original", dtype: torch.dtype = BF16) -> Merge:
    parted, read = fitted(open_checkpoint(base), [read_adapter(folder) for folder, _ in adapters])
    shares = [share for _, share in adapters]
    return Merge(parted, list(zip(read, shares, strict=True)), weights, dtype, Quantization())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def expected(base: Path, adapter: Path, scale: float, weights: str = "original") -> dict[str, torch.Tensor]:
    """W + s B A in float64, from the files as PEFT and transformers wrote them."""
    change = load_file(adapter / "adapter_model.safetensors")
    quantized = quantized_parameters(base, Quantization()) if weights == "dequantized" else set()
    result = {}
    for name, weight in weights_of(base).items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        weight = Quantization().round_trip(weight) if name in quantized else weight
        result[name] = weight.double()
        if f"{stem}.lora_A.weight" in change:
            a, b = (change[f"{stem}.lora_{half}.weight"].double() for half in "AB")
            result[name] = result[name] + scale * (b @ a)
    return result


@pytest.mark.parametrize("weights", ["original", "dequantized"])
@pytest.mark.parametrize("name", BASES)
def test_every_weight_is_the_nearest_to_float64(tmp_path: Path, name: str, weights: str) -> None:
    base = BASES[name](tmp_path)
    adapter = save_adapter(base, tmp_path / "adapter")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        target = tmp_path / f"merged-{dtype}"
        write_merged(merge_of(base, (adapter, 1.0), weights=weights, dtype=dtype), target)
        found, wanted = weights_of(target), expected(base, adapter, 8 / 4, weights)
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            assert tensor.dtype == dtype
            # Half of the distance to the next number; 1e-7 is what the sum in float32 may be off where terms cancel.
            nearest = 0.5 * torch.finfo(dtype).eps * wanted[key].abs() + 1e-7
            assert bool(((tensor.double() - wanted[key]).abs() <= nearest).all()), key


def test_the_round_trip_is_what_the_4_bit_layers_compute_with(tmp_path: Path) -> None:
    base = sharded_llama(tmp_path)
    section = ModelSection(model_name_or_path=str(base))
    model = load_model(section, Hardware(torch.device("cpu"), torch.bfloat16, "a test")).model
    stored, names = weights_of(base), quantized_parameters(base, Quantization())
    assert len(names) == 14 and not [name for name in names if "lm_head" in name or "embed" in name]
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        decoded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(Quantization().round_trip(stored[name]), decoded)


@pytest.mark.parametrize("name", BASES)
def test_the_merged_model_says_what_pefts_adapter_says(tmp_path: Path, name: str) -> None:
    base = BASES[name](tmp_path)
    adapter = save_adapter(base, tmp_path / "adapter")
    write_merged(merge_of(base, (adapter, 1.0), dtype=torch.float32), tmp_path / "merged")
    ids = torch.arange(3, 43).reshape(2, 20)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected, found, bare = tuned(ids).logits, merged(ids).logits, None
        with tuned.disable_adapter():
            bare = tuned(ids).logits
    assert merged.dtype == torch.float32, "config.json says so"
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - bare).abs().max() > 0.1


def test_rank_patterns_rslora_and_other_settings_scale_as_peft_does(tmp_path: Path) -> None:
    base = sharded_llama(tmp_path)
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 3}}
    adapter = save_adapter(base, tmp_path / "adapter", use_rslora=True, **patterns)
    write_merged(merge_of(base, (adapter, 1.0), dtype=torch.float32), tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    for name, tensor in weights_of(tmp_path / "merged").items():
        assert torch.allclose(tensor, peft[name], atol=1e-6), name


def test_several_adapters_are_added_with_their_weights_as_peft_adds_them(tmp_path: Path) -> None:
    base = sharded_qwen(tmp_path)
    one, two = (save_adapter(base, tmp_path / str(seed), seed=seed, r=seed + 2) for seed in (0, 1))
    write_merged(merge_of(base, (one, 0.7), (two, -0.25), dtype=torch.float32), tmp_path / "merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), one, "one")
    model.load_adapter(two, "two")
    model.add_weighted_adapter(["one", "two"], [0.7, -0.25], "both", combination_type="cat")
    model.set_adapter("both")
    peft = model.merge_and_unload().state_dict()
    for name, tensor in weights_of(tmp_path / "merged").items():
        assert torch.allclose(tensor, peft[name], atol=1e-6), name


def test_modules_saved_whole_take_the_base_weights_place(tmp_path: Path) -> None:
    base = sharded_llama(tmp_path)
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    merge = merge_of(base, (adapter, 1.0), dtype=torch.float32)
    write_merged(merge, tmp_path / "merged")
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(weights_of(tmp_path / "merged")["lm_head.weight"], saved)
    assert not torch.equal(saved, weights_of(base)["lm_head.weight"].float())
    with pytest.raises(UserError, match="it can only be merged alone"):
        merge_of(base, (adapter, 0.5), (adapter, 0.5))


def test_the_folder_is_a_hugging_face_model_with_the_adapters_tokenizer(tmp_path: Path) -> None:
    base = sharded_llama(tmp_path)
    adapter = save_adapter(base, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ 'mine' }}"
    tokenizer.save_pretrained(adapter)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    target = tmp_path / "merged"
    write_merged(merge_of(base, (adapter, 1.0)), target)
    index = json.loads((target / INDEX).read_text())
    places = index["weight_map"]
    assert {name: path.name for path in target.glob("*.safetensors") for name in load_file(path)} == places
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in weights_of(target).values())
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert (target / "chat_template.jinja").read_text() == "{{ 'mine' }}"
    assert AutoTokenizer.from_pretrained(target)("in the thing") == tokenizer("in the thing")
    assert json.loads((target / REPORT).read_text()) == {}
    # What vLLM, TGI and llama.cpp's converter read of a Hugging Face folder, and nothing that is an adapter's.
    others = {path.name for path in target.iterdir() if path.suffix != ".safetensors"}
    assert others == {
        "config.json",
        "generation_config.json",
        INDEX,
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        REPORT,
    }
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} <= {0o644, 0o664, 0o600} - {0o600}


def shard_of(base: Path, tensor: str) -> Path:
    return base / json.loads((base / INDEX).read_text())["weight_map"][tensor]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: shard_of(base, "model.norm.weight").unlink(), "the shard .* is missing"),
        (lambda base: shard_of(base, "model.norm.weight").write_bytes(b"no"), "the shard .* is damaged, from .* on"),
        (
            lambda base: shard_of(base, "model.norm.weight").write_bytes(
                shard_of(base, "model.norm.weight").read_bytes()[:-7]
            ),
            "the shard .* is damaged, from .* on",
        ),
        (
            lambda base: save_file({"other": torch.zeros(1)}, shard_of(base, "model.norm.weight")),
            "which does not hold it",
        ),
        (lambda base: (base / INDEX).write_text("{"), f"{INDEX} cannot be read"),
        (lambda base: (base / "config.json").write_text("{"), "config.json cannot be read"),
    ],
    ids=["missing", "no safetensors", "truncated", "another file", "index", "config"],
)
def test_a_damaged_base_is_refused_by_file_and_tensor(tmp_path: Path, damage, message: str) -> None:
    base = sharded_llama(tmp_path)
    damage(base)
    with pytest.raises(UserError, match=message):
        open_checkpoint(base)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"the weights are a pickle, which can hold code: .*pytorch_model\.bin"):
        open_checkpoint(tmp_path)


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base, other = sharded_llama(tmp_path / "a"), sharded_qwen(tmp_path / "b")
    adapter = save_adapter(other, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"changes model\.layers\.0\.mlp\.\w+\.weight of shape"):
        merge_of(base, (adapter, 1.0))


def test_no_room_on_the_disk_is_found_before(tmp_path: Path, monkeypatch) -> None:
    base = sharded_llama(tmp_path)
    merge = merge_of(base, (save_adapter(base, tmp_path / "adapter"), 1.0))
    monkeypatch.setattr(merging, "free_bytes", lambda folder: merge.result_bytes)
    with pytest.raises(UserError, match=r"needs 0\.1 GB at .*, where 0\.0 GB are free"):
        write_merged(merge, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_giving_up_leaves_nothing_and_an_old_folder_as_it_was(tmp_path: Path) -> None:
    base = sharded_llama(tmp_path)
    merge = merge_of(base, (save_adapter(base, tmp_path / "adapter"), 1.0))
    target = tmp_path / "merged"
    target.mkdir()
    (target / "old").touch()

    def give_up(folder: Path) -> dict:
        assert (folder / INDEX).exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_merged(merge, target, give_up)
    assert [path.name for path in target.iterdir()] == ["old"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".merged")]
