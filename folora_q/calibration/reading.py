"""Read text forward and backward, and feed the inputs of adapted layers to sketches and projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from folora_q.calibration.hooks import Counted, TokenSink, collect_inputs, collect_weighted_inputs
from folora_q.core import CovarianceSketch, ProjectedCovariance
from folora_q.data.batch_splitting import BatchSplitter, divided, ran_out, rows_of
from folora_q.data.tokens import Batch
from folora_q.distributed.processes import ONE, Processes
from folora_q.errors import RunError
from folora_q.models.logits import chunks, head_logits, hidden_states
from folora_q.models.parts import base_of

Text = Sequence[Batch]
Sink = TypeVar("Sink", CovarianceSketch, ProjectedCovariance)


@dataclass(frozen=True)
class Reading:
    """Reads text and feeds layers' inputs to sinks, which have the name of the first layer of their group.

    Attributes:
        modules: adapted layers by name; those of a group in `groups` read the same tensor.
        on_progress: called with the number of tokens read.
        weighted: weight tokens by their gradient; the unit is then that of the loss per labelled token.
        processes: share the text's batches; all of them call the same methods, and get the same sums.
    """

    model: PeftModel
    modules: Mapping[str, nn.Module]
    groups: Sequence[Sequence[str]]
    weighted: bool
    recompute: bool = False
    on_progress: Callable[[int], None] = lambda _: None
    splitter: BatchSplitter = field(default_factory=lambda: BatchSplitter("taking statistics of"))
    processes: Processes = ONE

    def stream(
        self, text: Text, count: int, new_sinks: Callable[[], dict[str, Sink]], draw: int | None = None
    ) -> dict[str, Sink]:
        """Return sinks that have seen a text; if memory runs out, start again with smaller batches.

        Args:
            count: the number of sinks, for the error.
            draw: as in `feed`.
        """
        while True:
            sinks: dict[str, Sink] = {}
            try:
                sinks = new_sinks()
                self.feed(text, sinks, draw=draw)
                fitted = True
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                fitted = False
            if self.processes.least(fitted):
                self._add_up(list(sinks.values()))
                return sinks
            if not sinks:
                raise RunError(
                    f"memory ran out for the sketches of {count} layers' inputs",
                    "set proxy.statistics_memory, e.g. to 0.2 (GiB), or lower gate.rank",
                )
            del sinks
            rows = max(self.splitter.fitting(len(batch.input_ids)) for batch in text)
            self.splitter.halve(rows, text[0].input_ids.shape[1])

    def _add_up(self, sinks: Sequence[CovarianceSketch | ProjectedCovariance]) -> None:
        """Add up what the processes have seen."""
        counts = torch.tensor([sink.count for sink in sinks], dtype=torch.float64, device=self.model.device)
        self.processes.add([counts, *(tensor for sink in sinks for tensor in sink.sums())])
        for sink, count in zip(sinks, counts.tolist(), strict=True):
            sink.count = int(count)

    def feed(self, text: Text, sinks: Mapping[str, TokenSink], draw: int | None = None) -> None:
        """Feed this process's share of a text to the sinks.

        Args:
            draw: seed of labels that are drawn at every position so that the weighted statistics are the Fisher
                information (`_drawn`); None uses the text's labels (the empirical Fisher). Of greedy text they are one
                of the two most likely tokens (`_drawn_of_two`).
        """
        text = divided(text, self.processes.count)
        labels = torch.Generator().manual_seed(draw) if draw is not None else None
        by_module = {name: sinks[group[0]] for group in self.groups if group[0] in sinks for name in group}
        seen, learned = (
            [int(x.sum()) for x in marks]
            for marks in zip(*((b.attention_mask, b.loss_positions) for b in text), strict=True)
        )
        unit = (sum(seen) / max(sum(learned), 1)) ** 0.5  # sinks average over all tokens
        watching = (
            collect_weighted_inputs(self.modules, by_module) if self.weighted else collect_inputs(self.modules, sinks)
        )
        with watching as counted, _backward_through(self.model, self.recompute) if self.weighted else torch.no_grad():
            for number, (batch, tokens) in enumerate(zip(text, seen, strict=True)):
                if not self.processes.owns(number):
                    if labels is not None:  # each token's label is the same, whichever process draws it
                        _numbers(len(batch.targets), labels)
                    self.on_progress(tokens)
                    continue
                rows = len(batch.input_ids)
                for start in range(0, rows, size := self.splitter.fitting(rows)):
                    part = rows_of(batch, start, start + size)
                    counted.count(part.attention_mask if self.weighted else part.loss_positions, part.weight)
                    if self.weighted:
                        _backward(base_of(self.model), part, unit * part.slope, counted, labels)
                    else:
                        ids, seen_by = part.input_ids, part.attention_mask
                        self.model(input_ids=ids, attention_mask=seen_by, use_cache=False, logits_to_keep=1)
                    counted.require_finite()
                self.on_progress(tokens)


def _backward(
    model: PreTrainedModel, part: Batch, unit: float, counted: Counted, labels: torch.Generator | None = None
) -> None:
    """Compute the gradient of the sum over tokens of their losses, times `unit`; logits a chunk at a time.

    Args:
        counted: has seen the forward pass, and is asked before labels are drawn, which needs finite logits.
        labels: draws each token's label and weight, instead of the text's.
    """
    hidden = hidden_states(model, part.input_ids, part.attention_mask)[part.loss_positions]
    counted.require_finite()
    wanted = part.targets
    if len(wanted) == 0:
        return
    states = hidden.detach().requires_grad_()
    for rows in chunks(len(wanted)):
        logits = head_logits(model, states[rows])
        if labels is None:
            loss = cross_entropy(logits, wanted[rows], reduction="sum")
        else:
            targets, weights = (_drawn_of_two if part.greedy else _drawn)(logits.detach(), labels)
            loss = cross_entropy(logits, targets, reduction="none") @ weights
        (unit * loss).backward()
    hidden.backward(states.grad)


def _drawn(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a label for each row of logits (n, vocabulary) from q ∝ p (1 - p), and return labels and weights, (n,).

    The second moment of the loss's gradient with labels of the model's own distribution p is the Fisher information.
    That gradient is about 1 - p(y), so where the model is sure it is almost always 0, and rarely large. Labels of q
    with the weight √(p / q) have the same second moment, and half the error or less where p is mostly near 1
    (importance sampling, with nearly the best q).

    Random signs make the weights' mean 0, as that of the gradient is with labels of p: otherwise the gradients of
    different tokens, which add up in a layer's output, would not be independent.

    The numbers are from a generator on the CPU, so labels depend on neither the device nor the batch size.
    """
    p = logits.float().softmax(-1)
    cumulative = (1 - p).mul_(p).cumsum_(-1)
    numbers, signs = _numbers(len(logits), generator, logits.device)
    total = cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, numbers * total, right=True).clamp_max(logits.shape[-1] - 1)
    smallest = torch.finfo(p.dtype).tiny
    return labels[:, 0], signs * (total / (1 - p.gather(1, labels)).clamp_min(smallest)).sqrt()[:, 0]


def _drawn_of_two(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one of the two most likely labels for each row of logits (n, vocabulary), each with probability 1/2.

    Where the model is sure, labels from its own distribution have almost no gradient: to second order the KL hardly
    changes there. But a greedy token changes once the logit of another one exceeds its own, and then the KL is large.
    With these labels every token counts, by how its lead over the second one changes.

    Returns:
        Labels, and weights of random sign as of `_drawn`, (n,).
    """
    numbers, signs = _numbers(len(logits), generator, logits.device)
    return logits.topk(2).indices.gather(1, (numbers < 0.5).long())[:, 0], signs


def _numbers(count: int, generator: torch.Generator, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return uniform numbers (count, 1) and random signs (count,)."""
    drawn = torch.rand(count, 2, generator=generator).to(device)
    return drawn[:, :1].contiguous(), torch.where(drawn[:, 1] < 0.5, -1.0, 1.0)


@contextmanager
def _backward_through(model: PeftModel, recompute: bool) -> Iterator[None]:
    """Let gradients reach every layer's output, although no weight is trained.

    All modules stay in evaluation mode: transformers recomputes only layers in training mode, in which some (OPT) apply
    dropout. So the layers' forward passes are checkpointed here.
    """
    inner = base_of(model)
    embedding = inner.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    layers = [m for m in inner.modules() if isinstance(m, GradientCheckpointingLayer)] if recompute else []
    own = {layer: layer.__dict__.get("forward") for layer in layers}  # accelerate's hooks set one
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for layer, forward in own.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward
