"""Verify a merged model: every weight on the disk, and its outputs compared with the adapter's.

1. Every merged weight is read back and compared with W + Σ wᵢ sᵢ Bᵢ Aᵢ in float64: each number must be the nearest one
   in its dtype. This detects a scale off by one percent, a missing module or two swapped matrices.
2. Logits of the merged model on held-out text are compared with those of PEFT's adapter on its base. Rounding must
   explain the mean difference: its noise, measured by rounding the same weights another way, and the lost share of the
   update, since a change of less than half the distance between two numbers is rounded away. And the merged model must
   be nearer to the adapter than to the base, which a small update, rounded to 16 bits, may not be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoConfig, PreTrainedModel

from folora_q.errors import RunError
from folora_q.export.ends import FittedCheckpoint
from folora_q.export.merge import Merge
from folora_q.models.classes import auto_class
from folora_q.models.parts import embedding_rows
from folora_q.models.weight_files import DTYPES, open_checkpoint

# Rows of a weight or of logits that are compared at a time.
ROWS = 1024
# Maximum number of logits kept per model: 0.8 GB.
MAX_LOGITS = 2 * 10**8
# The mean logit difference may be this multiple of that of another rounding.
ROUNDING_FACTOR = 2.0
# If memory suffices only for 16 bits, computing rounds too, the adapter's branch separately from the merged weight.
COMPUTING_FACTOR = 8.0
# In float32 rounding is too small for a comparison, so the limits are absolute.
FLOAT32_MEAN = 1e-4
FLOAT32_KL = 1e-9
# The merged model's difference from the adapter, as a share of its difference from the base. With noise as large as the
# adapter's effect it is 0.7.
MAX_SHARE_OF_BASE_DIFFERENCE = 0.8


@dataclass(frozen=True)
class MergedModel:
    """A merged model on disk, and the merge whose result it should be."""

    merge: Merge
    folder: Path


@dataclass(frozen=True)
class Difference:
    """Difference between two models' logits on the same text; the first is the adapter on its base.

    Attributes:
        largest, mean: of the absolute differences of logits.
        kl: KL(first ‖ second), nats per token.
        agreement: the share of positions with the same most likely token.
    """

    largest: float
    mean: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class CheckedWeights:
    """Result of comparing the weights.

    Attributes:
        changed: the number of weights that differ from the base's, all of them correctly.
        kept: the share of the update that is left after rounding, ⟨ΔW stored, ΔW⟩ / ‖ΔW‖², over all weights.
    """

    changed: int
    kept: float = 1.0


@dataclass(frozen=True)
class Verification:
    """Result of the verification.

    Attributes:
        weights: the number of weights that differ from the base's, all of them correctly.
        merged: adapter on its base compared with the merged model.
        base_difference: adapter on its base compared with the bare base.
        rounding: mean logit difference from another rounding of the same weights; None in float32.
        kept: the share of the update that rounding to the stored dtype keeps.
        tokens: the number of predictions compared.
        failures: sentences; empty if the merged model is the adapter.
    """

    weights: int
    merged: Difference
    base_difference: Difference
    rounding: float | None
    tokens: int
    failures: list[str]
    kept: float = 1.0

    @property
    def noise_share(self) -> float:
        """The mean logit difference from the adapter, as a share of the adapter's own effect."""
        return self.merged.mean / self.base_difference.mean

    def to_dict(self) -> dict[str, Any]:
        """Return the result for merge.json."""
        return {"verified": not self.failures, **asdict(self)}


def check_weights(merged_model: MergedModel, on_progress: Callable[[int], None] = lambda size: None) -> CheckedWeights:
    """Compare every weight on disk with its expected value, in float64.

    Args:
        on_progress: called with the bytes of each weight; they add up to `merge.result_bytes`.

    Raises:
        RunError: one is not the nearest in its dtype, or one that should change did not; the message names it.
    """
    merge = merged_model.merge
    merged = open_checkpoint(merged_model.folder, merge.trust)
    stored = whole = 0.0  # ⟨ΔW stored, ΔW⟩ and ‖ΔW‖²
    if merged.tensors.keys() != merge.base.tensors.keys():
        odd = sorted(merged.tensors.keys() ^ merge.base.tensors.keys())[0]
        raise RunError(f"the merged model and its base do not have the same weights: {odd} is only in one of them")
    for name in merge.base.tensors:
        found = merged.read(name)
        base = merge.base_weight(name)
        if found.shape != base.shape:
            raise RunError(
                f"{name} has the shape {tuple(found.shape)} in the merged model, {tuple(base.shape)} in the base"
            )
        wrong, *sums = _compared(merge, name, base, found)
        if wrong:
            raise RunError(f"the merged {name} is not the base's plus the adapter's change: {wrong}")
        stored, whole = stored + sums[0], whole + sums[1]
        on_progress(found.nbytes)
    return CheckedWeights(len(merge.changed), stored / whole if whole else 1.0)


def _compared(merge: Merge, name: str, base: Tensor, found: Tensor) -> tuple[str | None, float, float]:
    """Return what is wrong with a weight, if anything; ⟨ΔW stored, ΔW⟩ and ‖ΔW‖²."""
    if not base.is_floating_point():
        wrong = None if torch.equal(base, found) else "it is an integer tensor, and it was changed"
        return wrong, 0.0, 0.0
    stored = whole = 0.0
    deltas = [(share * delta.scale, delta) for share, delta in merge.deltas(name)]
    changed = not deltas
    for start in range(0, max(len(base), 1), ROWS):
        rows = slice(start, start + ROWS)
        expected = base[rows].double() if base.ndim else base.double()
        terms = expected.abs()
        for scale, delta in deltas:
            left, right = (delta.a.T, delta.b.T) if delta.transposed else (delta.b, delta.a)
            expected = expected + scale * (left[rows].double() @ right.double())
            terms = terms + abs(scale) * (left[rows].abs().double() @ right.abs().double())
        rank = max((delta.a.shape[0] for _, delta in deltas), default=0)
        allowed = 0.5 * _spacing(expected, found.dtype) + (rank + 4) * 2.0**-24 * terms * bool(deltas)
        actual = found[rows] if base.ndim else found
        error = (actual.double() - expected).abs() - allowed
        if bool((error > 0).any()):
            most = float((actual.double() - expected).abs().max())
            return f"a number is off by {most:.3g}, more than rounding", 0.0, 0.0
        if deltas:
            change = expected - base[rows].double()
            stored += float(((actual.double() - base[rows].double()) * change).sum())
            whole += float(change.square().sum())
        changed = changed or not torch.equal(actual, (base[rows] if base.ndim else base).to(found.dtype))
    return (None if changed else "it is unchanged from the base"), stored, whole


def _spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbouring numbers of a dtype, at float64 values."""
    info = torch.finfo(dtype)
    return info.eps * torch.exp2(values.abs().clamp_min(info.smallest_normal).log2().floor())


def check_outputs(
    merged_model: MergedModel,
    texts: Sequence[Sequence[int]],
    weights: CheckedWeights,
    compute: torch.dtype = torch.float32,
    on_progress: Callable[[int], None] = lambda models: None,
) -> Verification:
    """Compare logits on held-out text: adapter on its base, bare base, merged.

    One model is in memory at a time.

    Args:
        compute: the dtype that all three compute in; float32 is the most sensitive, with 4 bytes per weight.
        texts: token ids.
        weights: the result of `check_weights`.
        on_progress: called with 1 after each of three models.
    """
    merge = merged_model.merge
    tuned, bare = reference_logits(merge, texts, compute)
    on_progress(2)
    model = loaded_model(merged_model.folder, compute, merge)
    merged = logits_of(model, texts, tuned.shape[-1])
    rounding = None
    if merge.dtype != torch.float32:
        _round_otherwise(model, merge)
        rounding = float((logits_of(model, texts, tuned.shape[-1]) - merged).abs().mean())
    on_progress(1)
    found, effect = compare_logits(tuned, merged), compare_logits(tuned, bare)
    factor = ROUNDING_FACTOR if compute == torch.float32 else COMPUTING_FACTOR
    swallowed = max(1 - weights.kept, 0.0) * effect.mean
    limit = FLOAT32_MEAN if rounding is None else factor * rounding + ROUNDING_FACTOR * swallowed
    failures = []
    if not (found.mean <= limit and (rounding is not None or found.kl <= FLOAT32_KL)):
        failures.append(
            f"the merged model is not the adapter: their logits differ by {found.mean:.3g} on average, "
            f"of which rounding explains {limit:.3g}"
        )
    apart = compare_logits(bare, merged).mean
    if not found.mean < MAX_SHARE_OF_BASE_DIFFERENCE * apart:
        cause = ""
        if merge.dtype != torch.float32:
            cause = (
                f": rounding to {str(merge.dtype).removeprefix('torch.')} may hide the adapter, and --dtype float32 not"
            )
        failures.append(
            f"the merged model could be the base: its logits differ by {found.mean:.3g} on average from the adapter's, "
            f"and by {apart:.3g} from the base's{cause}"
        )
    return Verification(weights.changed, found, effect, rounding, len(tuned), failures, weights.kept)


def reference_logits(merge: Merge, texts: Sequence[Sequence[int]], compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the logits of PEFT's adapter on the base, and of the base."""
    base = loaded_model(merge.trained_on or merge.base.folder, compute, merge)
    if isinstance(merge.base, FittedCheckpoint):
        base.resize_token_embeddings(merge.base.rows, mean_resizing=False)  # the adapter has the rows themselves
    for name in merge.quantized if merge.trained_on is None else ():
        where = merge.layout.parameter_of[name]
        parameter, transposed = base.get_parameter(where), where in merge.layout.transposed
        held = merge.quantization.round_trip(parameter.data.T if transposed else parameter.data).to(compute)
        parameter.data = held.T.contiguous() if transposed else held
    vocabulary = embedding_rows(base)
    bare = logits_of(base, texts, vocabulary)
    names = [str(number) for number in range(len(merge.adapters))]
    model = PeftModel.from_pretrained(base, merge.adapters[0][0].folder, adapter_name=names[0])
    for (adapter, _), name in zip(merge.adapters[1:], names[1:], strict=True):
        model.load_adapter(adapter.folder, adapter_name=name)
    shares = [share for _, share in merge.adapters]
    if shares != [1.0]:
        model.add_weighted_adapter(names, shares, "together", combination_type="cat")
        model.set_adapter("together")
    return logits_of(model.eval(), texts, vocabulary), bare


def loaded_model(folder: Path, compute: torch.dtype, merge: Merge) -> PreTrainedModel:
    """Load the base, or the merged model made from it; `check_model` has checked the base's folder."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=merge.trust.remote_code)
    model = auto_class(config).from_pretrained(
        folder,
        dtype=compute,
        trust_remote_code=merge.trust.remote_code,
        use_safetensors=None if merge.trust.pickle else True,
        weights_only=True,
    )
    if getattr(model, "hf_quantizer", None) is not None:
        # Saved in 4 bits: dequantized as in training. Without gradients bitsandbytes rounds differently.
        model = model.dequantize(dtype=compute).to(compute)
    return model.eval()


def logits_of(model: PreTrainedModel | PeftModel, texts: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Return the logits of every prediction in the texts, one text after another, (n, vocabulary)."""
    most = max(1, MAX_LOGITS // vocabulary)
    rows: list[Tensor] = []
    with torch.no_grad():
        for ids in texts:
            left = most - sum(map(len, rows))
            if left <= 0:
                break
            rows.append(model(input_ids=torch.tensor([ids[: left + 1]]), use_cache=False).logits[0, :-1].float())
    return torch.cat(rows)


def _round_otherwise(model: PreTrainedModel, merge: Merge) -> None:
    """Move a twelfth of the rounded weights' numbers to a neighbour, at random.

    That has the variance of rounding, whose error is uniform between minus and plus half of the spacing.
    """
    generator = torch.Generator().manual_seed(0)
    as_stored = DTYPES[merge.dtype]
    changed = set(merge.changed)
    rounded = {
        parameter
        for name, parameter in merge.layout.parameter_of.items()
        if name in changed or merge.base.tensors[name].dtype != as_stored
    }
    parameters = dict(model.named_parameters())  # without the second names of tied ones
    for weight in (parameters[name].data for name in sorted(rounded & parameters.keys())):
        weight = weight if weight.ndim else weight[None]
        for start in range(0, len(weight), ROWS):
            rows = weight[start : start + ROWS]
            chance = torch.rand(rows.shape, generator=generator)
            steps = (chance < 1 / 24).double() - (chance > 23 / 24).double()
            rows.copy_(rows.double() + steps * _spacing(rows.double(), merge.dtype))


def compare_logits(first: Tensor, second: Tensor) -> Difference:
    """Compare two models' logits (n, vocabulary) on the same text."""
    apart = (first - second).abs()
    kl, agreed = 0.0, 0
    for start in range(0, len(first), ROWS):
        p = log_softmax(first[start : start + ROWS].double(), -1)
        q = log_softmax(second[start : start + ROWS].double(), -1)
        kl += float((p.exp() * (p - q)).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    return Difference(float(apart.max()), float(apart.mean()), kl / len(first), agreed / len(first))
