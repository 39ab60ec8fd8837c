"""Derive the shapes of a decoder's weights from its config.json alone.

`folora_q.memory.model_families` has the names of layers in each family. Other models are built on the meta device by
the caller, and `folora_q.memory.shapes_from_meta` reads their parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from folora_q.errors import UserError
from folora_q.memory.model_families import FAMILIES, Family, Flag
from folora_q.recipe.paths import short

Config = Mapping[str, Any]
# Far above any model; a file may contain anything.
MAX_LAYERS, MAX_SIZE = 2_000, 10**9


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder layer, W (outputs, inputs).

    Attributes:
        name: its path in the decoder layer, e.g. self_attn.q_proj.
        reads: a name for its input; layers with the same name share one tensor.
        adaptable: text passes through it, and PEFT does not mistake it for an expert (folora_q.models.target_modules).
    """

    name: str
    inputs: int
    outputs: int
    reads: str
    bias: bool = False
    adaptable: bool = True

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Layer:
    """A decoder layer.

    Attributes:
        linears: linear layers, which bitsandbytes quantizes and which can have an adapter.
        norms: the width of each norm.
        others: parameters outside of linear layers, including experts.
        experts: parameters of the experts, which transformers stores as 3-dimensional tensors that are neither
            quantized nor adapted.
        routed: the number of experts per token.
        active: their intermediate features in total.
        middle: intermediate features of the MLP of linear layers.
    """

    linears: tuple[Linear, ...]
    norms: tuple[int, ...]
    others: int
    experts: int = 0
    routed: int = 0
    active: int = 0
    middle: int = 0

    @property
    def unquantized(self) -> int:
        return self.others + sum(linear.outputs for linear in self.linears if linear.bias)

    def reading(self, tensor: str) -> list[Linear]:
        """Return the linear layers that read a tensor."""
        return [linear for linear in self.linears if linear.reads == tensor]


@dataclass(frozen=True)
class ModelShape:
    """A causal language model.

    Attributes:
        layers: decoder layers with their counts.
        outside: linear layers elsewhere (a vision tower): in 4 bits, and not used on text.
        skipped: weights of linear layers that a checkpoint saved in 4 bits keeps in 16.
        gpus: the number of GPUs over which `model.fsdp` can shard the decoder layers.
        others: parameters outside of the layers, without embeddings and head: the last norm, positions, a head's bias.
        tied: the head is the embedding.
        rms: norms are RMS norms, which always compute in float32.
        gated: the MLP multiplies two branches.
        eager: attention scores are materialized.
        fused: one linear layer computes queries, keys and values.
        rotary: positions rotate queries and keys, and are not added to embeddings.
        activation: hidden_act.
    """

    model_type: str
    vocabulary: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: tuple[tuple[Layer, int], ...]
    others: int
    tied: bool
    rms: bool = True
    gated: bool = True
    eager: bool = False
    fused: bool = False
    rotary: bool = True
    activation: str = "silu"
    outside: tuple[tuple[Linear, int], ...] = ()
    skipped: int = 0
    gpus: int = 1

    @property
    def depth(self) -> int:
        return sum(count for _, count in self.layers)

    @property
    def linears(self) -> list[tuple[Linear, int]]:
        """All linear layers except the head, with their counts."""
        return [(linear, count) for layer, count in self.layers for linear in layer.linears] + list(self.outside)

    @property
    def quantized(self) -> int:
        """Weights in 4 bits."""
        return sum(linear.weights * count for linear, count in self.linears) - self.skipped

    @property
    def experts(self) -> int:
        """Parameters of experts."""
        return sum(layer.experts * count for layer, count in self.layers)

    @property
    def unquantized(self) -> int:
        """Parameters in 16 bits."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        outside = sum(linear.outputs * count for linear, count in self.outside if linear.bias)
        inside = sum(layer.unquantized * count for layer, count in self.layers)
        return embeddings + self.others + outside + inside + self.skipped

    @property
    def parameters(self) -> int:
        return self.quantized + self.unquantized

    @property
    def largest(self) -> int:
        """Weights of the largest linear layer."""
        return max(linear.weights for linear, _ in self.linears)


# Names in config.json of each value.
NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim"),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
    "experts": ("num_local_experts", "num_experts"),
    "activation": ("hidden_act", "hidden_activation", "activation_function"),
}
# Names of linear layers that PEFT mistakes for experts in models with experts.
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "gate")
# Types of these models; in others only the experts themselves have such names.
RENAMED_BY_PEFT = frozenset(
    "qwen3_moe qwen3_next olmoe flex_olmo deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe glm4_moe"
    " glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe exaone_moe cohere2_moe longcat_flash afmoe solar_open mellum"
    " qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker".split()
)
NEEDED = ("hidden", "layers", "heads", "vocabulary")


def text_config(config: Config) -> Config:
    """Return the language model's part of a configuration."""
    return config.get("text_config") or config


def is_known(config: Config) -> bool:
    """Return whether the table has this model; it has no vision or audio models."""
    text = text_config(config)
    family = FAMILIES.get(text.get("model_type", ""))
    parts = any(key.endswith("_config") and key != "text_config" and "quant" not in key for key in config)
    return family is not None and not parts and not any(text.get(key) for key in family.unless)


def shape_of(config: Config) -> ModelShape:
    """Return the shapes of a model that is in the table.

    Raises:
        UserError: config.json lacks a required value.
    """
    text = text_config(config)
    model_type = text["model_type"]
    family = FAMILIES[model_type]
    given = {**family.defaults, **text}
    numbers = sizes(given)
    hidden, heads, kv_heads, head_dim = (numbers[key] for key in ("hidden", "heads", "kv_heads", "head_dim"))

    def flag(value: Flag) -> bool:
        return bool(given.get(value)) if isinstance(value, str) else value

    *readers, out = family.attention
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    attention = [
        Linear(name, hidden, width, "attention", flag(family.qkv_bias))
        for name, width in zip(readers, widths if len(readers) == 3 else [sum(widths)], strict=True)
    ] + [Linear(out, heads * head_dim, hidden, "attention output", flag(family.out_bias))]
    qk_norms = [heads * head_dim, kv_heads * head_dim] if family.qk_norm else []
    norms = (*[hidden] * family.norms, *qk_norms)
    norm_parameters = hidden * family.norms + (2 * head_dim if family.qk_norm == "head" else sum(qk_norms))
    others = norm_parameters * (1 if family.rms else 2)
    width = numbers["intermediate"]
    mlp = _mlp(family, hidden, width, flag(family.mlp_bias))
    dense = Layer((*attention, *mlp), norms, others, middle=width)
    layers = [(dense, numbers["layers"])]
    if family.expert_width:
        layers = _with_experts(family, given, numbers, dense, tuple(attention))
    return ModelShape(
        model_type=model_type,
        vocabulary=numbers["vocabulary"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=numbers["intermediate"],
        layers=tuple((layer, count) for layer, count in layers if count),
        others=hidden * (1 if family.rms else 2)
        + numbers["vocabulary"] * family.head_bias
        + numbers.get("positions", 0) * hidden * family.positions,
        tied=bool(given.get("tie_word_embeddings", config.get("tie_word_embeddings", family.tied))),
        rms=family.rms,
        gated=family.gated,
        eager=family.eager,
        fused=len(readers) == 1,
        rotary=not family.positions,
        activation=activation_of(given),
    )


def adaptable(linear: Linear, model_type: str) -> Linear:
    """Mark a layer that PEFT mistakes for an expert: in some models dense MLPs and shared experts have such names."""
    taken = model_type in RENAMED_BY_PEFT and linear.name.rpartition(".")[2] in EXPERT_NAMES
    return replace(linear, adaptable=not taken)


def leaving_out(shape: ModelShape, names: Sequence[str]) -> ModelShape:
    """Return the shape with the linear layers that a 4-bit checkpoint keeps in 16 bits.

    Args:
        names: modules as in transformers' `llm_int8_skip_modules`: the end or the beginning of a full name.
    """
    skipped = 0
    for linear, count in shape.linears:
        numbered = [name for name in names if re.search(rf"\.\d+\.{re.escape(linear.name)}$", name)]
        whole = any(linear.name.endswith(name) or re.match(rf"{re.escape(name)}(\.|$)", linear.name) for name in names)
        skipped += linear.weights * (count if whole else min(len(set(numbered)), count))
    return replace(shape, skipped=skipped)


def activation_of(given: Config) -> str:
    """Return the name of the MLP's activation function."""
    return str(first(given, "activation") or "silu")


def first(given: Config, key: str) -> Any:
    """Return a value by the first of its names in config.json that is set."""
    return next((given[name] for name in NAMES[key] if given.get(name) is not None), None)


def sizes(given: Config) -> dict[str, int]:
    """Return sizes by our names, whatever names a configuration has for them.

    Raises:
        UserError: a required one is missing, or one is invalid.
    """
    found = {key: first(given, key) for key in NAMES if key != "activation"}
    missing = [NAMES[key][0] for key in NEEDED if found[key] is None]
    if missing:
        raise UserError(f"config.json has no {', '.join(missing)}, so the model's size cannot be determined")
    found = {key: size(value, NAMES[key][0]) for key, value in found.items() if key in NEEDED or value not in (None, 0)}
    if found["layers"] > MAX_LAYERS:
        raise UserError(f"config.json: the number of layers is {found['layers']:,}, more than any model has")
    found.setdefault("kv_heads", found["heads"])
    found["head_dim"] = size(given.get("head_dim") or found["hidden"] // found["heads"], "head_dim")
    found.setdefault("intermediate", 4 * found["hidden"])  # GPT-2 omits it
    return found


def size(value: Any, name: str) -> int:
    """Check a number of features, heads or the like, and return it.

    Raises:
        UserError: it is invalid.
    """
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise UserError(f"config.json: {name} must be a whole number from 1 to {MAX_SIZE:,}, not {short(value)}")
    return value


def _mlp(family: Family, hidden: int, width: int, bias: bool, prefix: str = "mlp.") -> list[Linear]:
    reads = "attention" if family.norms == 1 else "mlp"  # with one norm, both read its output
    *readers, down = (prefix + name.removeprefix("mlp.") for name in family.mlp)
    branches = 2 if family.gated else 1
    first = [Linear(name, hidden, width * branches // len(readers), reads, bias) for name in readers]
    return [*first, Linear(down, width, hidden, f"{prefix}output", bias)]


def _with_experts(
    family: Family, given: Config, numbers: Mapping[str, int], dense: Layer, attention: tuple[Linear, ...]
) -> list[tuple[Layer, int]]:
    """Return layers with experts, and those that are dense by the configuration.

    transformers stores experts as (experts, 2 width, hidden) and (experts, hidden, width), and the router as
    (experts, hidden): parameters outside of linear layers.
    """
    hidden, experts = numbers["hidden"], numbers.get("experts", 0)
    width = size(given.get(family.expert_width), family.expert_width)
    step = size(given.get("decoder_sparse_step", 1), "decoder_sparse_step")
    left_out = given.get("mlp_only_layers") or []
    if not isinstance(left_out, list):
        raise UserError(f"config.json: mlp_only_layers must be a list of layers, not {short(left_out)}")
    every = range(numbers["layers"])
    sparse = sum(1 for index in every if experts and index not in left_out and (index + 1) % step == 0)
    shared, middle = [], 0
    if family.shared_expert:
        middle = size(given.get(family.shared_expert), family.shared_expert)
        shared = _mlp(family, hidden, middle, False, "mlp.shared_expert.")
        shared.append(Linear("mlp.shared_expert_gate", hidden, 1, "mlp"))
    model_type = given["model_type"]
    dense = replace(dense, linears=tuple(adaptable(linear, model_type) for linear in dense.linears))
    weights = experts * 3 * hidden * width
    with_experts = Layer(
        linears=(*attention, *shared),
        norms=dense.norms,
        others=dense.others + weights + experts * hidden,
        experts=weights,
        routed=(routed := size(given.get("num_experts_per_tok", 1), "num_experts_per_tok")),
        active=routed * width,
        middle=middle,
    )
    return [(with_experts, sparse), (dense, numbers["layers"] - sparse)]
