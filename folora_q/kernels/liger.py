"""Liger's kernels for norms, rotary embeddings and activations, on an NVIDIA GPU (https://github.com/linkedin/Liger-Kernel).

They are applied when the model is loaded, so that statistics, training and evaluations compute the same function. The
fused losses stay off: the head is applied to trained positions only, and statistics need its logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from folora_q.errors import RunError, UserError
from folora_q.models.logits import HEAD_TOLERANCE

OTHERWISE = "set training.kernels to auto, compile or none"


def apply_liger(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Replace layers' functions by Liger's, and check that the model computes the same logits.

    Args:
        input_ids: (1, t), some tokens to compare logits on.

    Raises:
        UserError: there is no GPU, the package is missing, or Liger has no kernels for this model.
        RunError: the logits differ by more than rounding.
    """
    if input_ids.device.type != "cuda":
        raise UserError("training.kernels: liger needs a GPU, and this run computes on a CPU", OTHERWISE)
    try:
        from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except ImportError as error:
        raise UserError(f"training.kernels: liger needs the package liger-kernel: {error}", OTHERWISE) from error
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"training.kernels: Liger has no kernels for models of type {kind}", OTHERWISE)
    before = _last_logits(model, input_ids)
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    difference = (_last_logits(model, input_ids) - before).abs().max() / before.abs().max()
    if not bool(difference <= HEAD_TOLERANCE):
        raise RunError(f"with Liger's kernels the logits differ by {float(difference):.2g} of the largest", OTHERWISE)


@torch.no_grad()
def _last_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits.float()
