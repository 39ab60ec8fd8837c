"""Memory of weights, adapter, optimizer, gates and sketches, in bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from folora_q.memory.activations import FLOAT32, Arithmetic
from folora_q.memory.model_families import FAMILIES
from folora_q.memory.shapes import Linear, ModelShape
from folora_q.recipe import Recipe
from folora_q.recipe.adapter import ALL_LINEAR
from folora_q.recipe.gate import GateSection
from folora_q.recipe.target_modules import Modules, targeted

FLOAT64 = 8
BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
# bitsandbytes: a constant per 64 weights; with double quantization it is a byte, with a float32 one per 256 of them.
BLOCK, NESTED_BLOCK = 64, 256
# Optimizer states: bytes each, number per parameter, and whether bitsandbytes pages them.
STATES = {
    "adamw_torch": (4, 2, False),
    "adamw_torch_fused": (4, 2, False),
    "adamw_8bit": (1, 2, False),
    "adamw_bnb_8bit": (1, 2, False),
    "paged_adamw_32bit": (4, 2, True),
    "paged_adamw_8bit": (1, 2, True),
    "ademamix_8bit": (1, 3, False),
    "paged_ademamix_8bit": (1, 3, True),
    "lion_8bit": (1, 1, False),
    "paged_lion_8bit": (1, 1, True),
    "adafactor": (0, 0, False),  # a row and a column of numbers
    "rmsprop": (4, 1, False),
    "sgd": (0, 0, False),
}
# Elements of the smallest tensors whose states bitsandbytes keeps in 8 bits, and pages.
SMALLEST_IN_8_BITS, SMALLEST_PAGED = 4096, 100_000
# Decoder layers' weights that FSDP2 holds at a time: two gathered, and the buffer of one.
GATHERED = 3
STATE_BLOCK = 256
# Names of the decoder layers in families that are not in the table, and of output layers in any.
STACKS = ("model.layers", "model.decoder.layers", "model.language_model.layers", "transformer.h", "transformer.blocks")
HEAD = "lm_head"
HEADS = (HEAD, "embed_out", "output", "head")


@dataclass(frozen=True)
class InputSpace:
    """Inputs that share a gate: d features, the adapted layers that read them, and the count in the model."""

    width: int
    readers: int
    count: int


def weights(shape: ModelShape, double: bool, compute: int) -> dict[str, int]:
    """Return bytes of the frozen model: NF4 or FP4 codes, their constants, and the rest in the compute dtype.

    Source: QLoRA, arXiv 2305.14314, section 3: 0.5 bytes per weight, and 0.5 or 0.127 bits for its constant.
    """
    codes = constants = 0
    for linear, count in shape.linears:
        blocks = -(-linear.weights // BLOCK)
        codes += count * -(-linear.weights // 2)
        constants += count * (blocks + FLOAT32 * -(-blocks // NESTED_BLOCK) if double else FLOAT32 * blocks)
    packed = shape.quantized / max(shape.quantized + shape.skipped, 1)
    codes, constants = round(codes * packed), round(constants * packed)
    return {"4-bit weights": codes, "their constants": constants, "16-bit weights": shape.unquantized * compute}


def sharded(whole: Mapping[str, int], shape: ModelShape, compute: int, on_host: bool) -> dict[str, int]:
    """Return what each GPU has of the frozen weights if FSDP shards the decoder layers.

    Constants, embeddings and head are complete on each. FSDP gathers a layer into a buffer, copies it to the layer's
    weights, and gathers the next one meanwhile.

    Args:
        whole: from `weights`.
        on_host: the shards are in the host's memory.
    """
    inside = sum(layer.unquantized * count for layer, count in shape.layers) * compute
    largest = max(sum(linear.weights for linear in layer.linears) // 2 for layer, _ in shape.layers)
    largest += max(layer.unquantized * compute for layer, _ in shape.layers)
    shares = 0 if on_host else 1 / shape.gpus
    return {
        "4-bit weights": round(whole["4-bit weights"] * shares),
        "their constants": whole["their constants"],
        "16-bit weights": whole["16-bit weights"] - inside + round(inside * shares),
        "gathered layers": GATHERED * largest,
    }


def arithmetic(recipe: Recipe, shape: ModelShape, on_gpu: bool) -> Arithmetic:
    """Return how layers compute in training: under autocast, unless in float32."""
    compute, section = BYTES[recipe.model.dtype], recipe.adapter
    adapted, head = None, False
    if section.target_modules != ALL_LINEAR or section.exclude_modules:
        layers = Modules(
            [name for linear, _ in shape.linears for name in full_names(shape, linear.name)], (), HEAD, False
        )
        chosen = set(targeted(section, layers))
        head = HEAD in chosen
        adapted = frozenset(
            linear.name for linear, _ in shape.linears if chosen.intersection(full_names(shape, linear.name))
        )
    return Arithmetic(
        compute=compute,
        autocast=compute < FLOAT32 and (on_gpu or recipe.model.dtype != "float16"),
        rank=recipe.adapter.r,
        adapted=adapted,
        head=head,
        dropout=recipe.adapter.lora_dropout > 0,
        offloading=on_gpu and recipe.training.activation_offloading,
        frozen=recipe.gate.enabled and not recipe.gate.facts.trains_a,
        eager=shape.eager or recipe.model.attn_implementation == "eager",
    )


def full_names(shape: ModelShape, name: str) -> list[str]:
    """Return the full names of a layer in all decoder layers, and its name alone for one outside of them.

    A pattern that matches some decoder layers counts as matching all.
    """
    stacks = [FAMILIES[shape.model_type].stack] if shape.model_type in FAMILIES else STACKS
    return [name, *(f"{stack}.{index}.{name}" for stack in stacks for index in range(shape.depth))]


def trained_whole(recipe: Recipe, shape: ModelShape) -> list[int]:
    """Return the sizes of the embeddings and heads in `adapter.modules_to_save`; tied ones count once."""
    heads = {name.rpartition(".")[2] in HEADS for name in recipe.adapter.modules_to_save or []}
    return [shape.vocabulary * shape.hidden] * min(len(heads), 1 if shape.tied else 2)


def head_is_whole(recipe: Recipe, shape: ModelShape) -> bool:
    """Return whether the output layer is trained in full, by its name or as the embedding that it is tied to."""
    names = {name.rpartition(".")[2] for name in recipe.adapter.modules_to_save or []}
    return not names.isdisjoint(HEADS) or (shape.tied and bool(names))


def adapter_tensors(shape: ModelShape, how: Arithmetic) -> Iterator[tuple[int, int]]:
    """Yield size and count of every A and B of the adapter; each A precedes its B."""
    for linear, count in shape.linears:
        if how.is_adapted(linear):
            yield how.rank * linear.inputs, count
            yield how.rank * linear.outputs, count
    if how.head:
        yield how.rank * shape.hidden, 1
        yield how.rank * shape.vocabulary, 1


def trained_tensors(shape: ModelShape, how: Arithmetic) -> list[tuple[int, int]]:
    """Return size and count of the trained tensors: all, or only the B's."""
    tensors = list(adapter_tensors(shape, how))
    return tensors[1::2] if how.frozen else tensors


def adapter_parameters(shape: ModelShape, how: Arithmetic) -> int:
    """Return the number of parameters of the adapter."""
    return sum(size * count for size, count in adapter_tensors(shape, how))


def trained_parameters(shape: ModelShape, how: Arithmetic) -> int:
    """Return the number of trained parameters."""
    return sum(size * count for size, count in trained_tensors(shape, how))


def optimizer_state(recipe: Recipe, shape: ModelShape, how: Arithmetic, on_gpu: bool) -> tuple[int, int]:
    """Return bytes of the optimizer's state, on the device and in pages that may move to the host.

    Rule spectral keeps Adam's moments of A in the gate's m coordinates, (r, m), in float32.
    """
    if recipe.gate.enabled and recipe.gate.facts.optimizer == "own":
        return _spectral_state(recipe, shape, how), 0
    name = recipe.training.optimizer_on(on_gpu)
    width, states, paged = STATES[name]
    resident = pages = 0
    for size, count in trained_tensors(shape, how):
        if name == "adafactor":
            resident += count * FLOAT32 * (how.rank + size // how.rank)
            continue
        small = width == 1 and size < SMALLEST_IN_8_BITS
        constants = states * FLOAT32 * -(-size // STATE_BLOCK) if width == 1 and not small else 0
        resident += count * constants
        if paged and on_gpu and size >= SMALLEST_PAGED:
            pages += count * states * width * size
        else:
            resident += count * states * size * (FLOAT32 if small else width)
    # transformers makes bitsandbytes keep the states of embeddings in float32.
    return resident + FLOAT32 * states * sum(trained_whole(recipe, shape)), pages


def _spectral_state(recipe: Recipe, shape: ModelShape, how: Arithmetic) -> int:
    total = 2 * FLOAT32 * sum(trained_whole(recipe, shape))
    for linear, count in shape.linears:
        if how.is_adapted(linear):
            columns = columns_of(recipe.gate, linear.inputs)
            total += count * 2 * FLOAT32 * how.rank * (columns + linear.outputs)
    rotations = (columns_of(recipe.gate, space.width) ** 2 * space.count for space in input_spaces(shape, how))
    return total + FLOAT32 * sum(rotations)


def input_spaces(shape: ModelShape, how: Arithmetic) -> list[InputSpace]:
    """Return the input spaces that get a gate: layers that read the same tensor share one."""
    found = []
    for layer, count in shape.layers:
        tensors: dict[str, list[Linear]] = {}
        for linear in layer.linears:
            if how.is_adapted(linear):
                tensors.setdefault(linear.reads, []).append(linear)
        found += [InputSpace(readers[0].inputs, len(readers), count) for readers in tensors.values()]
    return [*found, *[InputSpace(shape.hidden, 1, 1)] * how.head]


def columns_of(section: GateSection, width: int) -> int:
    """Return m, the number of directions in a gate's basis: those of both sketches."""
    return min(2 * section.rank, width)


def gates(recipe: Recipe, shape: ModelShape, how: Arithmetic, on_gpu: bool) -> tuple[int, int]:
    """Return bytes of the gates on the model's device, P₀ (d, m) and M (m, m), and of grams and V on the host, float64.

    With rule frozen no step needs them, and all are on the host.
    """
    if not recipe.gate.enabled:
        return 0, 0
    width = BYTES[recipe.gate.basis_dtype_on(on_gpu)]
    device = host = 0
    for space in input_spaces(shape, how):
        m = columns_of(recipe.gate, space.width)
        device += space.count * width * m * (space.width + m)
        host += space.count * FLOAT64 * 3 * m * m
    return (0, device + host) if how.frozen and on_gpu else (device, host)


def sketches(recipe: Recipe, shape: ModelShape, how: Arithmetic) -> int:
    """Return the most bytes that a reading of the text holds: first sketches (d, l), later bases (d, m) and images.

    The first also has a random test matrix (d, l) for every width. `proxy.statistics_memory` limits the rest.
    """
    section = recipe.gate
    first = later = 0
    for space in input_spaces(shape, how):
        first += space.count * space.width * min(section.rank + section.oversampling, space.width)
        later += space.count * max((_reading(space.width, *each) for each in section.readings), default=0)
    widths = {space.width for space in input_spaces(shape, how)}
    tests = sum(width * min(section.rank + section.oversampling, width) for width in widths)
    limit = float("inf") if recipe.proxy.statistics_memory is None else recipe.proxy.statistics_memory * 2**30
    first, later = (min(FLOAT32 * held, limit) for held in (first, later))
    return int(max(first + FLOAT32 * tests, later))


def _reading(width: int, columns: int, image: bool) -> int:
    m = min(columns, width)
    return m * (width * (1 + image) + m)


def covariances(recipe: Recipe, shape: ModelShape, how: Arithmetic) -> int:
    """Return bytes on the host for solving gates: both texts' bases (d, l) and the last joint one (d, m), in float64.

    With refinements also ΣP of both, in float32.
    """
    section, total = recipe.gate, 0
    for space in input_spaces(shape, how):
        columns = 2 * min(section.rank + section.oversampling, space.width)  # of which k are used, as a view
        columns += max((min(m, space.width) for m, _ in section.readings), default=0)
        images = 2 * max((min(m, space.width) for m, image in section.readings if image), default=0)
        total += space.count * space.width * (FLOAT64 * columns + FLOAT32 * images)
    return total
