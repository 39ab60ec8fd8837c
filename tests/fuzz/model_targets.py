"""Targets for downloaded files: adapters and models, as `merge`, `chat`, `eval`, `estimate` and `train` read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.conftest import write_recipe
from tests.fuzz.basics import CHECKPOINT, build_adapter, command, named, tiny, tiny_adapter
from tests.fuzz.contract import Target


def read_adapter(folder: Path, file: str) -> None:
    """Read an adapter as `merge` does, and find it as `chat` and `eval` do."""
    from folora_q.models.adapter_file import read_adapter
    from folora_q.targets.find import find_target

    find_target(str(folder / "adapter"))
    read_adapter(folder / "adapter")


def read_and_merge(folder: Path, file: str) -> None:
    command("merge", folder / "adapter", "--base-model", folder / "model", "--no-verify", "--output", folder / "merged")


def read_and_load(folder: Path, file: str) -> None:
    """Load an adapter as `chat` and `eval` do."""
    from folora_q.recipe.schema import ModelSection
    from folora_q.targets.find import find_target
    from folora_q.targets.load import Precision, load_target

    against = ModelSection(model_name_or_path=str(folder / "model"))
    load_target(find_target(str(folder / "adapter")), Precision("float32", 16), against, compare=True)


def build_model(folder: Path) -> None:
    shutil.copytree(tiny(), folder / "model")


def read_model(folder: Path, file: str) -> None:
    """Load a model and its tokenizer as `chat`, `eval` and `train` do."""
    from folora_q.targets.find import find_target
    from folora_q.targets.load import Precision, load_target

    load_target(find_target(str(folder / "model")), Precision("float32", 16))


def build_gguf(folder: Path) -> None:
    from tests.models.load_test import write_gguf

    write_gguf(tiny(), folder / "model.gguf")


def read_gguf(folder: Path, file: str) -> None:
    """Convert a GGUF file to a model folder."""
    from folora_q.models.gguf import convert_gguf

    convert_gguf(folder / file, folder / "made")


def build_named(folder: Path) -> None:
    from tests.targets.folders import write_run

    write_run(tiny(), tiny_adapter(), folder / "run")


def read_named(folder: Path, file: str) -> None:
    """Find what a name stands for, as `chat` and `eval` do."""
    from folora_q.errors import UserError
    from folora_q.targets.find import find_target

    refused = None
    for name in ("", "adapter", "merged", CHECKPOINT):
        try:
            find_target(str(folder / "run" / name))
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused


def build_weights(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny())
    model.save_pretrained(folder, max_shard_size="300KB")


def read_weights(folder: Path, file: str) -> None:
    """Read a base tensor by tensor, as `merge` does."""
    from folora_q.models.weight_files import open_checkpoint

    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors:
        checkpoint.read(name)


# Models for estimates.

SIZES = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "rope_scaling": {"factor": 2.0}},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 1024},
    "qwen3_moe": {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 4,
                  "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [0], "head_dim": 16},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 1024},
    "gemma3": {"text_config": SIZES | {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 128}},
}  # fmt: skip


def build_configs(folder: Path) -> None:
    from tests.memory.config_test import save_gguf

    write_recipe(folder, folder / "llama")
    for name, config in CONFIGS.items():
        (folder / name).mkdir()
        text = json.dumps({"model_type": name} | ({} if name == "gemma3" else SIZES) | config)
        (folder / name / "config.json").write_text(text, encoding="utf-8")
    save_gguf(folder / "model.gguf")


def read_config(folder: Path, file: str) -> None:
    """Estimate for a GPU that is too small, so that `estimate` also gives advice."""
    model = folder / (file if file.endswith(".gguf") else Path(file).parent)
    command("estimate", folder / "recipe.yaml", f"model.model_name_or_path={model}", "--gpu", "1")


ADAPTER = {"adapter/adapter_config.json": "adapter", "adapter/adapter_model.safetensors": "safetensors"}
PARTS = ("config", "generation_config", "tokenizer", "tokenizer_config")
MODEL = named("json", *(f"model/{part}.json" for part in PARTS)) | {"model/model.safetensors": "safetensors"}
NAMED = named("json", "run/run.json", "run/adapter/adapter_config.json", "run/merged/merge.json")
WEIGHTS = named("json", "config.json", "model.safetensors.index.json")
TARGETS = [
    Target("adapter", build_adapter, ADAPTER, read_adapter),
    Target("adapter: merge", build_adapter, ADAPTER, read_and_merge, rate=20, writes=True),
    Target("adapter: load", build_adapter, ADAPTER, read_and_load, rate=20),
    Target("base model", build_model, MODEL, read_model, rate=20, large=True),
    Target("base weights", build_weights, WEIGHTS | {"model-00001-of-00002.safetensors": "safetensors"}, read_weights),
    Target("GGUF model", build_gguf, {"model.gguf": "gguf"}, read_gguf, rate=20, large=True, writes=True),
    Target("names", build_named, NAMED | {"run/recipe.resolved.yaml": "yaml"}, read_named),
    Target(
        "estimate",
        build_configs,
        named("json", *(f"{name}/config.json" for name in CONFIGS)) | {"model.gguf": "gguf"},
        read_config,
        rate=4,
    ),
]
