"""Derive the shapes of a decoder's weights from a model on the meta device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from folora_q.memory.shapes import (
    Config,
    Layer,
    Linear,
    ModelShape,
    activation_of,
    adaptable,
    is_known,
    leaving_out,
    shape_of,
    size,
    sizes,
    text_config,
)

# The stack, the number and the rest in a name within a decoder layer.
IN_A_LAYER = re.compile(r"^(?P<stack>.*?\b(?:layers|h|blocks|layer|block))\.(?P<number>\d+)\.(?P<name>.+)$")
OUTPUTS = re.compile(r"(^|\.)(o_proj|out_proj|dense|c_proj|down_proj|fc2|w2|wo|dense_4h_to_h)$")
NORM = re.compile(r"(norm|ln_?\w*)\.weight$")
NOT_TEXT = re.compile(r"(^|\.)(embed_)?(vision|visual|audio|multi_modal|mm_|image|patch)")


Built = tuple[Config, Iterable[tuple[str, tuple[int, ...], bool]]]


def find_shape(config: Config, skipped: Sequence[str], build: Callable[[Config], Built]) -> ModelShape:
    """Return the shapes of a model: from the table of families, or built without weights.

    Args:
        skipped: modules that a 4-bit checkpoint keeps in 16 bits.
        build: returns the arguments of `shape_of_parameters`, for a model that is not in the table.

    Raises:
        UserError: config.json lacks a required value, or the model cannot be built.
    """
    shape = shape_of(config) if is_known(config) else shape_of_parameters(*build(config))
    return leaving_out(shape, skipped)


def shape_of_parameters(config: Config, found: Iterable[tuple[str, tuple[int, ...], bool]]) -> ModelShape:
    """Return the shapes of a model from its parameters, for families that are not in the table.

    Args:
        config: config.json with defaults filled in.
        found: for every parameter its name, its shape ((outputs, inputs) for weights), and whether it belongs to a
            linear layer other than the head.

    Raises:
        UserError: config.json lacks a required value.
    """
    text = text_config(config)
    numbers, model_type = sizes(text), str(text.get("model_type", "unknown"))
    parameters = list(found)
    biases = {name.removesuffix(".bias") for name, _, linear in parameters if linear and name.endswith(".bias")}
    layers: dict[tuple[str, str], tuple[list[Linear], list[int], list[int], list[int]]] = {}
    outside: list[tuple[Linear, int]] = []
    others = 0
    embeddings = [name for name, shape, _ in parameters if shape == (numbers["vocabulary"], numbers["hidden"])]
    for name, shape, linear in parameters:
        place = IN_A_LAYER.match(name)
        is_weight = linear and len(shape) == 2
        if place is None or NOT_TEXT.search(name):
            if is_weight:
                bare = name.removesuffix(".weight")
                is_text = NOT_TEXT.search(name) is None
                outside.append((Linear(bare, shape[1], shape[0], bare, bare in biases, is_text), 1))
            elif name not in embeddings and not linear:
                others += prod(shape)
            continue
        linears, norms, rest, experts = layers.setdefault((place["stack"], place["number"]), ([], [], [], []))
        inner = place["name"].removesuffix(".weight")
        if is_weight:
            parent = inner.rpartition(".")[0]
            reads = inner if OUTPUTS.search(inner) else f"{parent} {shape[1]}"
            linears.append(Linear(inner, shape[1], shape[0], reads, name.removesuffix(".weight") in biases))
        elif not linear:
            rest.append(prod(shape))
            experts.extend([prod(shape)] if len(shape) == 3 else [])
            if NORM.search(name):
                norms.append(_norm_width(inner, shape[0], numbers))
    layers = {key: (_parallel(*lists[:2], numbers["hidden"]), *lists[1:]) for key, lists in layers.items()}
    counts: dict[Layer, int] = {}
    for linears, norms, rest, experts in layers.values():
        taken = tuple(adaptable(linear, model_type) for linear in linears)
        routing = _routing(text, numbers, experts)
        layer = Layer(taken, tuple(norms), sum(rest), sum(experts), *routing, _middle(linears))
        counts[layer] = counts.get(layer, 0) + 1
    return ModelShape(
        model_type=model_type,
        vocabulary=numbers["vocabulary"],
        hidden=numbers["hidden"],
        heads=numbers["heads"],
        kv_heads=numbers["kv_heads"],
        head_dim=numbers["head_dim"],
        intermediate=numbers["intermediate"],
        layers=tuple(counts.items()),
        others=others,
        tied=len(embeddings) < 2,
        rms=not any(re.search(NORM.pattern.replace("weight", "bias"), name) for name, _, _ in parameters),
        gated=any(_is_gated(layer, numbers["intermediate"]) for layer in counts),
        outside=tuple(outside),
        activation=activation_of(text),
    )


def _parallel(linears: list[Linear], norms: list[int], hidden: int) -> list[Linear]:
    """Let layers with inputs as wide as the model share the norm's output, if there is one norm per layer."""
    if norms.count(hidden) != 1:
        return linears
    return [linear if linear.reads == linear.name else replace(linear, reads=str(linear.inputs)) for linear in linears]


def _norm_width(name: str, size: int, numbers: Mapping[str, int]) -> int:
    """Return the width that a norm reads: one over a head reads all heads."""
    if size != numbers["head_dim"] or size == numbers["hidden"]:
        return size
    return size * numbers["kv_heads" if "k_" in name or "key" in name else "heads"]


def _is_gated(layer: Layer, width: int) -> bool:
    """Return whether the MLP has two branches, in one linear layer or in two."""
    into = [linear.outputs for linear in layer.linears if "att" not in linear.name and linear.outputs % width == 0]
    return layer.experts > 0 or sum(into) >= 2 * width


def _routing(text: Config, numbers: Mapping[str, int], experts: list[int]) -> tuple[int, int]:
    """Return the number of experts per token, and their intermediate features."""
    if not experts:
        return 0, 0
    routed = size(text.get("num_experts_per_tok") or 1, "num_experts_per_tok")
    return routed, routed * size(text.get("moe_intermediate_size") or numbers["intermediate"], "moe_intermediate_size")


def _middle(linears: list[Linear]) -> int:
    return max((one.inputs for one in linears if OUTPUTS.search(one.name) and "att" not in one.name), default=0)
