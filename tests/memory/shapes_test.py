"""Shapes from config.json are those of transformers' own models, built on the meta device."""

from __future__ import annotations

from typing import Any

import pytest

from folora_q.errors import UserError
from folora_q.memory.model_families import FAMILIES
from folora_q.memory.shapes import ModelShape, is_known, shape_of, text_config
from folora_q.memory.shapes_from_meta import shape_of_parameters

SMALL = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GPT2 = SMALL | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
CONFIGS: list[dict[str, Any]] = [
    *(
        LLAMA_LIKE | ({} if name == "gpt_neox" else GROUPED) | {"model_type": name}
        for name in sorted(FAMILIES)
        if name not in ("gpt2", "qwen2_moe", "qwen3_moe", "mixtral")
    ),
    LLAMA_LIKE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    LLAMA_LIKE | {"model_type": "llama", "head_dim": 24},
    LLAMA_LIKE | {"model_type": "mistral", "head_dim": None},
    LLAMA_LIKE | {"model_type": "phi", "num_key_value_heads": None},
    LLAMA_LIKE | {"model_type": "qwen3", "attention_bias": True, "head_dim": 24},
    LLAMA_LIKE | {"model_type": "gemma", "tie_word_embeddings": False, "head_dim": 32},
    LLAMA_LIKE | {"model_type": "mixtral", "num_local_experts": 4},
    LLAMA_LIKE | EXPERTS | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 56, "mlp_only_layers": [1]},
    LLAMA_LIKE | EXPERTS | {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
    LLAMA_LIKE | {"model_type": "gpt_neox", "attention_bias": False},
    LLAMA_LIKE | {"model_type": "starcoder2", "use_bias": False},
    GPT2 | {"model_type": "gpt2"},
    GPT2 | {"model_type": "gpt2", "n_inner": 96},
]


# Qwen's gate on its shared expert is not found to read what the expert reads.
ODD = {"mlp.shared_expert_gate"}


def described(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key not in LLAMA_LIKE | GPT2}
    return "-".join(str(value) for value in rest.values())


def from_transformers(config: dict[str, Any]) -> ModelShape:
    from folora_q.models.meta import parameter_shapes

    return shape_of_parameters(*parameter_shapes(config))


def sharing(shape: ModelShape) -> list[tuple[set[frozenset[str]], int]]:
    """By layer, which linear layers read the same tensor, and how often the layer is there."""
    return sorted(
        (
            (
                {
                    frozenset(other.name for other in layer.reading(linear.reads)) - ODD
                    for linear in layer.linears
                    if linear.name not in ODD
                },
                count,
            )
            for layer, count in shape.layers
        ),
        key=str,
    )


@pytest.mark.parametrize("config", CONFIGS, ids=described)
def test_the_table_agrees_with_transformers(config: dict[str, Any]) -> None:
    from folora_q.models.meta import parameter_shapes

    _, built = parameter_shapes(config)
    ours, theirs = shape_of(config), from_transformers(config)
    counted = sum(size for _, size in ((name, _product(shape)) for name, shape, _ in built))
    assert ours.parameters == theirs.parameters == counted
    assert ours.quantized == sum(_product(shape) for _, shape, linear in built if linear and len(shape) == 2)

    def linears(shape: ModelShape) -> list[tuple]:
        return sorted(
            (linear.name, linear.inputs, linear.outputs, linear.bias, count) for linear, count in shape.linears
        )

    assert linears(ours) == linears(theirs)
    assert sharing(ours) == sharing(theirs)
    norms = [sorted((sorted(layer.norms), count) for layer, count in shape.layers) for shape in (ours, theirs)]
    assert norms[0] == norms[1]
    for name in (
        "tied",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "intermediate",
        "activation",
        "depth",
        "others",
        "rms",
        "gated",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    experts = [[(o.experts, o.routed, o.active, o.middle) for o, _ in shape.layers] for shape in (ours, theirs)]
    assert sorted(experts[0]) == sorted(experts[1])


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


@pytest.mark.parametrize("config", [c for c in CONFIGS if c["model_type"] in ("llama", "gpt2", "phi3")], ids=described)
def test_what_is_quantized_is_what_the_loader_quantizes(config: dict[str, Any], tmp_path) -> None:
    from transformers import CONFIG_MAPPING

    from folora_q.models.layout import quantized_parameters
    from folora_q.models.quantization import Quantization

    CONFIG_MAPPING[config["model_type"]].from_dict(config).save_pretrained(tmp_path)
    names = quantized_parameters(tmp_path, Quantization())
    ours = shape_of(config)
    assert len(names) == sum(count for _, count in ours.linears)
    for linear, _ in ours.linears:
        assert any(name.endswith(f".{linear.name}.weight") for name in names), linear.name


def test_a_family_that_also_sees_is_not_in_the_table() -> None:
    text = LLAMA_LIKE | {"model_type": "gemma3_text"}
    assert is_known(text)
    assert is_known({"model_type": "some_wrapper", "text_config": text})
    assert not is_known({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}})
    assert text_config({"text_config": text}) is text


def test_an_unknown_family_is_built_on_the_meta_device() -> None:
    config = LLAMA_LIKE | {"model_type": "stablelm"}
    assert not is_known(config)
    shape = from_transformers(config)
    assert shape.depth == 3
    assert {linear.name for linear, _ in shape.linears} >= {"self_attn.q_proj", "mlp.down_proj"}
    assert len(shape.layers[0][0].reading("mlp 64")) == 2


def test_a_model_that_also_sees_has_linear_layers_outside() -> None:
    text = LLAMA_LIKE | {"model_type": "gemma3_text", "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = from_transformers({"model_type": "gemma3", "text_config": text, "vision_config": vision})
    assert shape.depth == 3
    assert sum(count for _, count in shape.outside) >= 6
    assert shape.parameters > shape_of(text).parameters


@pytest.mark.parametrize("kind", ["no-such-model", ""])
def test_a_type_that_transformers_does_not_know(kind: str) -> None:
    from folora_q.models.meta import parameter_shapes

    with pytest.raises(UserError, match="knows no model"):
        parameter_shapes({"model_type": kind})


def test_a_configuration_without_sizes() -> None:
    with pytest.raises(UserError, match="has no hidden_size, num_hidden_layers"):
        shape_of({"model_type": "llama", "vocab_size": 10, "num_attention_heads": 2})
