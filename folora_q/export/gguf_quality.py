"""Measure what a quantized GGUF file keeps of the tuning: task loss, KL from the trained model, and the update itself.

The file's weights are read with transformers' GGUF reader, which is independent of the converter, and put into the
merged model. The trained model is PEFT's adapter on its base, as in the verification of the merge.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from folora_q.data.tokens import IGNORED
from folora_q.errors import RunError, first_line
from folora_q.export.merge import Merge
from folora_q.export.texts import Amount, CheckTexts
from folora_q.export.verify import MergedModel, compare_logits, loaded_model, logits_of, reference_logits
from folora_q.models.gguf import MALFORMED
from folora_q.models.parts import embedding_rows

# Rows of the task: more and longer than for the verification, since answers may come late in a row.
TASK_AMOUNT = Amount(rows=16, length=256)
# If less of the task's gain is left, larger types are suggested.
GOOD_SHARE = 0.95


@dataclass(frozen=True)
class TaskLosses:
    """Losses on the trained tokens of held-out rows of the task, nats per token.

    Attributes:
        base: the base that was trained on, without the adapter.
        trained: with the adapter.
        file: the GGUF file.
    """

    base: float
    trained: float
    file: float
    tokens: int

    @property
    def share(self) -> float | None:
        """The share of the loss decrease that is left; None if training did not decrease the loss."""
        gain = self.base - self.trained
        return (self.base - self.file) / gain if gain > 0 else None


@dataclass(frozen=True)
class GgufQuality:
    """What a GGUF file keeps of the tuning.

    Attributes:
        kl: KL(trained ‖ file), nats per token.
        agreement: the share of positions with the same most likely token.
        tokens: the number of predictions compared.
        task: None without held-out rows of the task.
        update_kept: ⟨W of the file − W of the base, ΔW⟩ / ‖ΔW‖²: 1 if the update is there, 0 if it is not.
        update_noise: ‖W of the file − W merged‖ / ‖ΔW‖, the rounding in units of the update.
    """

    kl: float
    agreement: float
    tokens: int
    task: TaskLosses | None
    update_kept: float
    update_noise: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result for merge.json."""
        return asdict(self) | ({"task_share": self.task.share} if self.task else {})

    def in_words(self, kind: str) -> str:
        """Return one or two sentences for a person."""
        near = (
            f"KL from the trained model is {self.kl:.2g} nats per token, and {self.agreement:.1%} of the most likely "
            f"tokens are the same ({self.tokens:,} tokens)"
        )
        if self.task is None or self.task.share is None:
            rounding = f"rounding of {self.update_noise:.2g} times its norm"
            return f"{kind} has {self.update_kept:.0%} of the update of the weights, and {rounding}; {near}"
        task = self.task
        losses = f"task loss {task.file:.4f}, trained {task.trained:.4f}, base {task.base:.4f}"
        words = f"{kind} keeps {task.share:.1%} of what the task's training gained ({losses}); {near}"
        if task.share is not None and task.share < GOOD_SHARE:
            words += ". A larger type keeps more: q6_k, q8_0"
        return words


def measure_gguf(
    path: Path,
    merged_model: MergedModel,
    texts: CheckTexts,
    compute: torch.dtype,
    on_progress: Callable[[int], None] = lambda models: None,
) -> GgufQuality:
    """Compare a GGUF file with the trained model and its base, on held-out text and by the weights.

    One model is in memory at a time, and the file's weights next to it.

    Args:
        texts: the result of `check_texts`.
        compute: the dtype that all models compute in.
        on_progress: called with the number of models that are done, of three.

    Raises:
        RunError: transformers cannot read the file's architecture.
    """
    merge = merged_model.merge
    model = loaded_model(merged_model.folder, compute, merge)
    tensors = _tensors_of(path, model, compute)
    kept, noise = _update_kept(merge, tensors)
    parameters = dict(model.named_parameters())
    for name in parameters.keys() & tensors.keys():
        parameters[name].data.copy_(tensors[name])
    del tensors
    file = logits_of(model, texts.sequences, embedding_rows(model))
    del model, parameters
    on_progress(1)
    trained, bare = reference_logits(merge, texts.sequences, compute)
    on_progress(2)
    found = compare_logits(trained, file)
    targets = _targets(texts, len(file))
    learned = targets != IGNORED
    task = None
    if bool(learned.any()):
        losses = [float(cross_entropy(logits[learned], targets[learned])) for logits in (bare, trained, file)]
        task = TaskLosses(losses[0], losses[1], losses[2], int(learned.sum()))
    return GgufQuality(found.kl, found.agreement, len(file), task, kept, noise)


def _tensors_of(path: Path, model: PreTrainedModel, compute: torch.dtype) -> dict[str, Tensor]:
    """Return the file's weights by the names of the model's parameters.

    Raises:
        RunError: transformers cannot read them, or they are not all of the model's.
    """
    try:
        read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model, torch_dtype=compute)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, NotImplementedError, struct.error, *MALFORMED) as error:
        raise RunError(f"transformers cannot read {path.name}: {first_line(error)}") from error
    tensors: dict[str, Tensor] = read["tensors"]
    for name, parameter in model.named_parameters():
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise RunError(f"transformers does not find {name} in {path.name}")
    return tensors


def _update_kept(merge: Merge, tensors: dict[str, Tensor]) -> tuple[float, float]:
    """Return `update_kept` and `update_noise` over all weights that adapters add to."""
    along = square = rest = 0.0
    for name in merge.changed:
        deltas = merge.deltas(name)
        stored = tensors.get(merge.layout.parameter_of[name])
        if not deltas or stored is None:
            continue
        change = torch.stack([share * delta.dense() for share, delta in deltas]).sum(0)
        found = stored.float() - merge.base_weight(name).float()
        along += float((found * change).sum(dtype=torch.float64))
        square += float(change.square().sum(dtype=torch.float64))
        rest += float((found - change).square().sum(dtype=torch.float64))
    return (along / square, (rest / square) ** 0.5) if square else (1.0, 0.0)


def _targets(texts: CheckTexts, count: int) -> Tensor:
    """Return the label of each prediction, in the order and number of `logits_of`."""
    return torch.tensor([label for labels in texts.labels for label in labels[1:]][:count])
