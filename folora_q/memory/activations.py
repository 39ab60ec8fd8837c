"""Memory of activations: what a training step keeps for its backward pass, and its temporaries.

Bytes are derived from the operations of transformers' decoder layers and of PEFT's 4-bit LoRA layer, tensor by tensor,
and a test compares them with what autograd keeps. Letters: n tokens, h hidden size, i intermediate size, c bytes of the
compute dtype, r rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from folora_q.memory.shapes import Layer, Linear, ModelShape

FLOAT32 = 4
# Float32 tensors (n, h) in the backward pass of an RMS norm at the same time: the gradient, the two products that are
# summed, and the gradients of the power and of the mean.
NORM_BACKWARD = 5
# Layers' inputs on the device with offloading: those that TRL keeps while they are copied, and the present one
# (max_fwd_stash_size in trl/models/activation_offloading.py).
IN_FLIGHT = 5 + 1
# Tokens and vocabulary entries per tile in TRL's fused head (trl/kernels/chunked_logprob.py, trl/trainer/utils.py).
TILE_TOKENS, TILE_WORDS = 4096, 32_768
# Activation functions that transformers implements with several PyTorch operations, whose results are kept.
WRITTEN_OUT = {"gelu_new", "gelu_fast", "quick_gelu"}
KEPT_WRITTEN_OUT = 4


@dataclass(frozen=True)
class BatchShape:
    """Sequences in one pass.

    Attributes:
        masked: some are padded or packed, so that attention uses a mask (rows, 1, length, length).
    """

    rows: int
    length: int
    masked: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Arithmetic:
    """How a layer computes.

    Attributes:
        compute: bytes of the compute dtype.
        autocast: the Trainer's autocast is on, as in 16 bits: PEFT then does not cast an adapter's input, and PyTorch
            casts the adapter; without it PEFT casts the input of every adapted layer to float32.
        rank: of the adapter.
        adapted: names of the adapted linear layers; None for all.
        head: the output layer has an adapter too.
        dropout: the adapter's dropout is on, whose mask and result are kept.
        eager: attention scores are materialized.
        frozen: only B is trained.
        offloading: layers' inputs that checkpointing keeps are moved to the host.
    """

    compute: int
    autocast: bool
    rank: int
    adapted: Collection[str] | None = None
    head: bool = False
    dropout: bool = False
    eager: bool = False
    frozen: bool = False
    offloading: bool = False

    @property
    def adapter(self) -> int:
        """Bytes per number inside the adapter."""
        return self.compute if self.autocast else FLOAT32

    @property
    def casts(self) -> bool:
        """Whether every adapted layer makes a float32 copy of its input."""
        return not self.autocast and self.compute != FLOAT32

    def is_adapted(self, linear: Linear) -> bool:
        return linear.adaptable and (self.adapted is None or linear.name in self.adapted)


def kept_in_layer(shape: ModelShape, layer: Layer, batch: BatchShape, how: Arithmetic) -> int:
    """Return the bytes that autograd keeps of one decoder layer without checkpointing."""
    per_token = (
        _kept_by_norms(shape, layer, how)
        + _kept_by_adapters(shape, layer, how)
        + _kept_by_attention(shape, batch, how)
        + _kept_by_mlp(shape, layer, how)
    )
    mask = 0 if how.eager or not batch.masked else batch.rows * batch.length**2 * how.compute  # as it is added
    return per_token * batch.tokens + mask


def _kept_by_norms(shape: ModelShape, layer: Layer, how: Arithmetic) -> int:
    """An RMS norm keeps its input in float32 and a root; a layer norm its input (float32 under autocast) and two."""
    width = FLOAT32 if shape.rms or how.autocast else how.compute
    return sum(width * norm + FLOAT32 * (1 if shape.rms else 2) for norm in layer.norms)


def _kept_by_adapters(shape: ModelShape, layer: Layer, how: Arithmetic) -> int:
    """A keeps its input unless it is frozen, B its input of r numbers; the frozen weight keeps nothing.

    Adapted layers that read one tensor keep it once, unless each makes a float32 copy of it, or a 16-bit one under
    autocast after a layer norm, whose output is float32 then. The attention already keeps its own output.
    """
    kept = 0
    for tensor in dict.fromkeys(linear.reads for linear in layer.linears):
        readers = [linear for linear in layer.linears if linear.reads == tensor and how.is_adapted(linear)]
        if not readers:
            continue
        width = readers[0].inputs
        copies = how.casts or (how.autocast and not shape.rms and "output" not in tensor)
        kept += how.adapter * how.rank * len(readers)
        if how.dropout:
            kept += width * len(readers)  # its mask
        if how.frozen:
            continue
        if copies or how.dropout:
            kept += how.adapter * width * len(readers)
        elif tensor != "attention output" or how.eager:
            kept += how.compute * width
    return kept


def _kept_by_attention(shape: ModelShape, batch: BatchShape, how: Arithmetic) -> int:
    """Queries, keys, values, output, and a float32 number per head. With a mask, keys and values are repeated."""
    queries = shape.heads * shape.head_dim
    repeated = batch.masked or how.eager
    own = shape.kv_heads * shape.head_dim
    keys = queries if repeated else own
    if not how.eager:
        # A view of one fused result keeps all of it.
        rest = queries + own if shape.fused and shape.rotary and keys == own else 0
        return how.compute * (2 * queries + 2 * keys + rest) + FLOAT32 * shape.heads
    # Scores: the softmax in float32 and cast back, and the tanh of a soft cap.
    scores = FLOAT32 + (how.compute if how.compute != FLOAT32 else 0) + (how.compute if shape.eager else 0)
    return how.compute * (queries + 2 * keys) + scores * shape.heads * batch.length


def _kept_by_mlp(shape: ModelShape, layer: Layer, how: Arithmetic) -> int:
    """The activation function's input; with a gate, also both factors of the product. The product is an input."""
    tensors = (KEPT_WRITTEN_OUT if shape.activation in WRITTEN_OUT else 1) + (2 if shape.gated else 0)
    experts = 3 * layer.active + layer.routed * shape.hidden if layer.active else 0
    return how.compute * (tensors * layer.middle + experts)


def kept(shape: ModelShape, batch: BatchShape, how: Arithmetic) -> int:
    """Return the bytes that autograd keeps of a forward pass without checkpointing, up to the head.

    The first norm keeps nothing, as nothing before it is trained; the last one does.
    """
    return sum(kept_in_layer(shape, layer, batch, how) * count for layer, count in shape.layers) + _rotary(
        shape, batch, how
    )


def kept_with_checkpointing(shape: ModelShape, batch: BatchShape, how: Arithmetic) -> int:
    """Return the bytes of the layers' inputs, which checkpointing keeps, and of what the last norm keeps."""
    return inputs_on_device(shape, batch, how) + FLOAT32 * (shape.hidden + 1) * batch.tokens + shared(shape, batch, how)


def inputs_of_layers(shape: ModelShape, batch: BatchShape, how: Arithmetic) -> int:
    """Return the bytes of all layers' inputs, which checkpointing keeps."""
    return shape.depth * shape.hidden * how.compute * batch.tokens


def inputs_on_device(shape: ModelShape, batch: BatchShape, how: Arithmetic) -> int:
    """Return the bytes of the layers' inputs that are on the device: all, or with offloading those on their way."""
    share = min(IN_FLIGHT / shape.depth, 1) if how.offloading else 1
    return int(inputs_of_layers(shape, batch, how) * share)


def shared(shape: ModelShape, batch: BatchShape, how: Arithmetic) -> int:
    """Return the bytes that all layers share: the mask, and the rotary tables."""
    mask = batch.rows * batch.length**2 * (how.compute if how.eager else 1) if batch.masked or how.eager else 0
    return mask + _rotary(shape, batch, how)


def _rotary(shape: ModelShape, batch: BatchShape, how: Arithmetic) -> int:
    return 2 * batch.length * shape.head_dim * how.compute


def passing_backward(shape: ModelShape, layer: Layer, batch: BatchShape, how: Arithmetic) -> int:
    """Return the bytes at the peak of a layer's backward pass beyond what the layer kept.

    At the MLP's last linear layer: the incoming gradient, (n, h), and that of its input through the frozen weight,
    which is dequantized for it, when the adapter's kept tensors are freed and its gradient exists. Without autocast the
    adapter's gradients are float32: the incoming one, the same scaled, and that of its input.
    """
    middle = max(layer.middle, layer.active)
    largest = max(linear.weights for linear in layer.linears) * how.compute
    incoming = how.compute * shape.hidden * batch.tokens
    gradient = how.compute * middle * batch.tokens
    if how.casts:
        return incoming + max(largest, FLOAT32 * (middle + 2 * shape.hidden) * batch.tokens)
    return incoming + max(largest + gradient, 2 * gradient)


def at_backward(shape: ModelShape, batch: BatchShape, how: Arithmetic, checkpointing: bool) -> tuple[int, int]:
    """Return the peak of a backward pass after the head's: bytes that layers keep, and bytes of the present layer.

    With checkpointing the present layer is recomputed, and those of the last norm are freed.
    """
    layers = [layer for layer, _ in shape.layers]
    if checkpointing:
        again = (kept_in_layer(shape, each, batch, how) + passing_backward(shape, each, batch, how) for each in layers)
        return inputs_on_device(shape, batch, how) + shared(shape, batch, how), max(again)
    passing = [passing_backward(shape, each, batch, how) for each in layers]
    return kept(shape, batch, how), max(*passing, passing_last_norm(shape, batch, how))


def passing_last_norm(shape: ModelShape, batch: BatchShape, how: Arithmetic) -> int:
    """Return the bytes of the last norm's backward pass, during which all layers' activations are in memory."""
    return (NORM_BACKWARD * FLOAT32 + how.compute) * shape.hidden * batch.tokens


def passing_head(shape: ModelShape, batch: BatchShape, how: Arithmetic, fused: bool) -> int:
    """Return the bytes of the head and the loss, if every token is trained.

    Fused, as on a GPU: a copy of the trained tokens' hidden states, their gradient in float32, and one tile of logits,
    always 32,768 wide. Otherwise all logits: the loss keeps float32 log-probabilities, and its backward pass makes two
    gradients of them; or in the forward pass, the logits as computed and in float32.
    """
    if fused:
        tile = min(batch.tokens, TILE_TOKENS) * TILE_WORDS * how.compute
        return batch.tokens * shape.hidden * (how.compute + FLOAT32) + tile
    return batch.tokens * (3 * FLOAT32 * shape.vocabulary + how.compute * shape.hidden)
