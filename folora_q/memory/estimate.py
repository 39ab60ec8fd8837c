"""Estimate a run's peak memory by stage and component, from the recipe and the model's shapes.

A stage's peak is that of its largest moment. The worst case is assumed: every sequence has the maximum length, every
token is trained, batches are padded. docs/memory.md says what is counted and what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from folora_q.block_sizes import GENERAL_WINDOW, HEAD_ROWS, LOGIT_ROWS, STATISTICS_LENGTH
from folora_q.memory import components as parts
from folora_q.memory.activations import (
    FLOAT32,
    Arithmetic,
    BatchShape,
    at_backward,
    inputs_of_layers,
    kept,
    kept_with_checkpointing,
    passing_head,
    shared,
)
from folora_q.memory.shapes import ModelShape
from folora_q.recipe import Recipe
from folora_q.recipe.earlier_adapter import rank_in

# Components on a device, in the order of their lifetimes.
PARTS = (
    "4-bit weights",
    "earlier adapter",
    "their constants",
    "16-bit weights",
    "decoded weights",
    "gathered layers",
    "CUDA context",
    "adapter",
    "adapter in 16 bits",
    "gradients",
    "optimizer",
    "gates",
    "sketches",
    "KV cache",
    "activations",
    "a layer at work",
    "logits",
)
Device = Literal["gpu", "cpu"]
Parts = dict[str, int]
GIB = 2**30
# Values of `model.fsdp` with which FSDP shards the base.
SHARDED = ("shard", "offload")
# Share of a card that is kept free, for fragmentation and the estimate's error.
MARGIN = 0.05
# Assumed, not measured: memory of the driver and CUDA's libraries, and cuBLAS's workspace.
CUDA_CONTEXT = GIB // 2
# Python with all libraries: measured on a CPU, assumed with CUDA.
LIBRARIES = {"cpu": GIB * 6 // 10, "gpu": 3 * GIB}
# Tokens before a sample or an answer: a template with its system prompt.
OPENING = 64
# Bytes per sequence and vocabulary entry in sampling: logits as computed and in float32, and probabilities; the paper's
# mixture also sorts them, with indices in int64, and sums them up.
SAMPLING, SAMPLING_MIXTURE = 4 + 4, 4 + 4 + 4 + 8 + 4 + 4
# Rows that a sketch converts at a time, and their bytes: float32, and float64 for the energy. `core` imports no other
# package and this one no PyTorch, so tests/memory/estimate_test.py checks that it is `ROWS` in folora_q.core.sketch.
READ_ROWS, READ_BYTES = 512, 4 + 8
# Tensors (n, h) of a layer in a pass without gradients: the embeddings, the residual, and a norm's output.
STREAMS = 3
# Float32 tensors of LOGIT_ROWS logits: when models are compared (folora_q.evaluation), and in weighted statistics.
COMPARED_TENSORS, WEIGHTED_TENSORS = 6, 4


@dataclass(frozen=True)
class MemoryStage:
    """The largest moment of a stage: bytes by part, on the model's device and on the host."""

    name: str
    device: Parts
    host: Parts

    @property
    def on_device(self) -> int:
        return sum(self.device.values())

    @property
    def on_host(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class MemoryEstimate:
    """A run's memory.

    Attributes:
        stages: in order. On a CPU the device is the host, and `host` is empty.
        disk: bytes written, by kind.
        trained: the number of trained parameters.
    """

    device: Device
    stages: tuple[MemoryStage, ...]
    disk: Parts
    trained: int

    @property
    def largest(self) -> MemoryStage:
        """The stage with the peak."""
        return max(self.stages, key=lambda stage: stage.on_device)

    @property
    def peak(self) -> int:
        """The bytes that the device needs."""
        return self.largest.on_device

    def fits(self, gib: float, stage: str | None = None) -> bool:
        """Return whether the run, or one of its stages, fits a card of `gib` GiB, with the margin."""
        needed = self.peak if stage is None else next(s.on_device for s in self.stages if s.name == stage)
        return needed <= gib * GIB * (1 - MARGIN)

    @property
    def host(self) -> int:
        """The bytes that the host needs."""
        return max(stage.on_host for stage in self.stages)


def estimate(recipe: Recipe, shape: ModelShape, device: Device = "gpu") -> MemoryEstimate:
    """Estimate a run's peak memory, stage by stage."""
    run = _Run(recipe, shape, device)
    stages = [run.loading(), run.sampling(), run.statistics(), run.training(), run.evaluation()]
    if not recipe.gate.enabled:
        stages.pop(2)
    if device == "cpu":
        stages = [MemoryStage(stage.name, _together(stage.host, stage.device), {}) for stage in stages]
    return MemoryEstimate(device, tuple(stages), run.disk(), run.trained)


def _together(one: Parts, other: Parts) -> Parts:
    return {name: one.get(name, 0) + other.get(name, 0) for name in one | other}


class _Run:
    def __init__(self, recipe: Recipe, shape: ModelShape, device: Device) -> None:
        self.recipe, self.shape, self.on_gpu = recipe, shape, device == "gpu"
        self.how = parts.arithmetic(recipe, shape, self.on_gpu)
        self.plain = Arithmetic(self.how.compute, autocast=False, rank=0, adapted=(), eager=self.how.eager)
        whole = sum(parts.trained_whole(recipe, shape))
        self.pairs = parts.adapter_parameters(shape, self.how)
        self.adapter = self.pairs + whole
        self.trained = parts.trained_parameters(shape, self.how) + whole
        self.weights = parts.weights(shape, recipe.model.bnb_4bit_use_double_quant, self.how.compute)
        if recipe.model.adapter is not None:  # an estimate: it may adapt other layers than this run does
            rank = rank_in(Path(recipe.model.adapter))
            self.weights["earlier adapter"] = FLOAT32 * self.pairs * rank // max(self.how.rank, 1)
        self.always = {"libraries": LIBRARIES[device]}
        self.whole = self.weights
        if shape.gpus > 1 and recipe.model.fsdp in SHARDED:
            on_host = recipe.model.fsdp == "offload"
            self.weights = parts.sharded(self.whole, shape, self.how.compute, on_host)
            if on_host:
                self.always["4-bit weights"] = self.whole["4-bit weights"] // shape.gpus
        elif not self.on_gpu:  # folora_q.models.decoded, where memory is not short
            self.weights["decoded weights"] = shape.quantized * self.how.compute
        self.gates, self.solved = parts.gates(recipe, shape, self.how, self.on_gpu)
        self.state, self.pages = parts.optimizer_state(recipe, shape, self.how, self.on_gpu)
        self.context = {"CUDA context": CUDA_CONTEXT} if self.on_gpu else {}
        self.decoded = shape.largest * self.how.compute
        self.checkpointing = recipe.training.recomputes_on(self.on_gpu)
        self.statistics_recompute = recipe.statistics_recompute_on(self.on_gpu)
        self.sampled = OPENING + recipe.proxy.max_new_tokens
        self.kept = recipe.keep.longest

    def loading(self) -> MemoryStage:
        """Loading, tensor by tensor: each is in 16 bits on the host and on the device until it is quantized."""
        largest = max(self.shape.largest, self.shape.vocabulary * self.shape.hidden) * self.how.compute
        device = self.weights | {"a layer at work": self.decoded} | self.context
        host = self.always | {"a layer at work": largest}
        if "gathered layers" in self.weights:  # complete there, before it is sharded
            host |= self.whole
        return MemoryStage("loading", device, host)

    def sampling(self) -> MemoryStage:
        section = self.recipe.proxy
        width = SAMPLING_MIXTURE if section.decoding == "paper" else SAMPLING
        logits = section.batch_size * self.shape.vocabulary * (self.how.compute + width)
        device = self.weights | self._generating(section.batch_size, self.sampled) | {"logits": logits} | self.context
        return MemoryStage("sampling", device, self.always)

    def _generating(self, rows: int, length: int) -> Parts:
        """Keys and values of every layer, those of one layer twice while they grow; and a dequantized weight."""
        tokens = 2 * self.shape.kv_heads * self.shape.head_dim * self.how.compute * rows * length
        return {"KV cache": tokens * (self.shape.depth + 1), "a layer at work": self.decoded}

    def statistics(self) -> MemoryStage:
        recipe, shape = self.recipe, self.shape
        length = max(min(recipe.training.max_length, STATISTICS_LENGTH), self.sampled, self.kept)
        batch = BatchShape(recipe.statistics_batch_size(length), length)
        held = parts.sketches(recipe, shape, self.how)
        widest = max((space.width for space in parts.input_spaces(shape, self.how)), default=0)
        # For the layer that is read, also the rows without padding.
        read = batch.tokens * self.how.compute * (2 * widest + STREAMS * shape.hidden) + READ_ROWS * widest * READ_BYTES
        if recipe.gate.weighted:
            activations = self._watched(batch, widest)
        else:
            activations = max(read, self._forward(batch)) + shared(shape, batch, self.how)
        device = self.weights | {"adapter": FLOAT32 * self.adapter, "sketches": held, "activations": activations}
        host = self.always | {"covariances": parts.covariances(recipe, shape, self.how), "gates": self.solved}
        return MemoryStage("statistics", device | self.context, host)

    def _watched(self, batch: BatchShape, widest: int) -> int:
        """A backward pass without adapters, which keeps adapted layers' inputs; the loss is computed in chunks."""
        shape, how = self.shape, self.plain
        spaces = parts.input_spaces(shape, self.how)
        recompute = self.statistics_recompute
        depth = 1 if not recompute else shape.depth
        inputs = sum(space.count * space.width for space in spaces) // depth * how.compute * batch.tokens
        stored, passing = at_backward(shape, batch, how, recompute)
        forward = (kept_with_checkpointing if recompute else kept)(shape, batch, how)
        logits = LOGIT_ROWS * shape.vocabulary * (how.compute + WEIGHTED_TENSORS * FLOAT32)
        head = logits + 2 * batch.tokens * shape.hidden * how.compute
        # A layer's input in float32, weighted and not, and the rows that a sketch converts.
        fed = 2 * FLOAT32 * batch.tokens * widest + READ_ROWS * widest * READ_BYTES
        return max(forward + head, stored + inputs + max(passing, fed)) + self.decoded

    def _forward(self, batch: BatchShape) -> int:
        """A pass without gradients and adapters: the MLP's or the attention's tensors, and a dequantized weight."""
        shape, c = self.shape, self.how.compute
        middle = max(max(layer.middle, layer.active) for layer, _ in shape.layers)
        mlp = (3 if shape.gated else 2) * middle + STREAMS * shape.hidden
        heads = shape.heads * shape.head_dim
        scores = batch.length * shape.heads * (FLOAT32 + c) if self.how.eager else 0
        attention = 4 * heads + STREAMS * shape.hidden
        return batch.tokens * max(c * mlp, c * attention + scores) + self.decoded

    def training(self) -> MemoryStage:
        """The largest of three moments of a step: the head, the backward pass of a layer, and the optimizer's step.

        The passes without gradients that objectives dpo and kto need are smaller: they come first, and keep nothing.
        """
        training, shape, how = self.recipe.training, self.shape, self.how
        rows = training.per_device_train_batch_size * training.sequences_per_row
        batch = BatchShape(rows, training.max_length, masked=rows > 1)
        if training.packing:  # TRL joins them into one row
            batch = BatchShape(1, rows * training.max_length)
        # No fused loss with an adapter on the head or a trained head (folora_q.training.trainer).
        fused = self.on_gpu and not (how.head or parts.head_is_whole(self.recipe, shape))
        head = passing_head(shape, batch, how, fused)
        casts = how.compute * self.pairs if how.autocast else 0
        forward = kept_with_checkpointing if self.checkpointing else kept
        stored, passing = at_backward(shape, batch, how, self.checkpointing)
        moments: list[Parts] = [
            {"activations": forward(shape, batch, how), "logits": head},
            {"activations": stored, "a layer at work": passing},
        ]
        moments = [moment | {"adapter in 16 bits": casts} for moment in moments]
        moments.append({"a layer at work": self._optimizer_step()})
        device = (
            self.weights
            | {"adapter": FLOAT32 * self.adapter, "gradients": FLOAT32 * self.trained}
            | {"optimizer": self.state, "gates": self.gates}
            | max(moments, key=lambda moment: sum(moment.values()))
        )
        offloaded = inputs_of_layers(shape, batch, how) if how.offloading else 0
        host = self.always | {"optimizer": self.pages, "gates": self.solved, "activations": offloaded}
        return MemoryStage("training", device | self.context, host)

    def _optimizer_step(self) -> int:
        """The adapter before the step, and about six tensors for the largest stack of steps that passes the gate."""
        if not self.recipe.gate.enabled or self.recipe.gate.facts.optimizer != "wrapped":
            return 0
        stacks: dict[tuple[int, int], int] = {}
        for space in parts.input_spaces(self.shape, self.how):
            key = space.width, space.readers
            stacks[key] = stacks.get(key, 0) + space.count * space.readers * self.how.rank * space.width
        return FLOAT32 * (self.trained + 6 * max(stacks.values(), default=0))

    def evaluation(self) -> MemoryStage:
        """The largest of comparing, answering and measuring drift; optimizer and gates are still in memory.

        Autocast is off: PEFT casts an adapted layer's input to float32, and its result is float32, also when scaled.
        """
        section, shape, c = self.recipe.evaluation, self.shape, self.how.compute
        length = max(self.recipe.training.max_length, self.sampled, self.kept, GENERAL_WINDOW)
        batch = BatchShape(section.batch_size, length)
        middle = max(max(layer.middle, layer.active) for layer, _ in shape.layers)
        adapted = (
            batch.tokens * (middle * (2 * c + 2 * FLOAT32) + shape.hidden * (STREAMS * c + c + FLOAT32)) + self.decoded
        )
        hidden = 2 * batch.tokens * shape.hidden * c
        compared = FLOAT32 * (LOGIT_ROWS * shape.vocabulary * COMPARED_TENSORS + HEAD_ROWS * shape.hidden)
        drift = batch.tokens * (middle * (3 * c + FLOAT32) + shape.hidden * (STREAMS * c + FLOAT32))
        answering = self._generating(section.batch_size, length + section.max_new_tokens)
        moments = [
            {"activations": adapted + hidden // 2 + shared(shape, batch, self.how)},
            {"activations": hidden, "logits": compared},
            {"activations": drift + shared(shape, batch, self.how)},
            answering | {"a layer at work": answering["a layer at work"] + adapted},
        ]
        device = (
            self.weights
            | {"adapter": FLOAT32 * self.adapter, "optimizer": self.state, "gates": self.gates}
            | max(moments, key=lambda moment: sum(moment.values()))
        )
        host = self.always | {"optimizer": self.pages, "gates": self.solved}
        return MemoryStage("evaluation", device | self.context, host)

    def disk(self) -> Parts:
        """The bytes written; the model is counted as downloaded, in 16 bits."""
        training = self.recipe.training
        adapter = self.adapter * parts.BYTES[self.recipe.export.adapter_dtype]
        saves = training.save_steps is not None or self.recipe.keeps_best
        # One more than `save_total_limit` while the newest is written; without save_steps, the one at the end.
        copies = training.save_total_limit + 1 if saves else 1
        found = {
            "the model": 2 * self.shape.parameters,
            "adapter": adapter,
            "gates": self.gates + self.solved,
            "checkpoints": copies * (FLOAT32 * self.adapter + self.state + self.pages),
        }
        return {name: size for name, size in found.items() if size}
