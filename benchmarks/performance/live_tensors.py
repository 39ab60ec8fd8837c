"""Count the bytes of live tensors during a training step, without a GPU and without computing anything.

`LiveTensors` counts the storages that PyTorch's operations create, until they are freed: what a GPU's allocator counts.
Under `FakeTensorMode` nothing is computed, so that a step of a 7B model takes a second. Memory that an operation
allocates and frees internally is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from folora_q.models.parts import base_of


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of storages that are created while it is active.

    Attributes:
        live: current bytes.
        peak: the largest number of bytes so far; callers may reset it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of these tensors, which existed before."""
        self.sizes.update((tensor.untyped_storage()._cdata, 0) for tensor in tensors)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class FakeLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit layer for fake tensors, which bitsandbytes' parameter class cannot hold."""

    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = module.in_features, module.out_features
        size = self.in_features * self.out_features
        blocks = -(-size // 64)
        nested = QuantState(
            absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
        )
        weight: Any = nn.Parameter(torch.empty(size // 2, 1, dtype=torch.uint8), requires_grad=False)
        weight.quant_state = QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8),
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=dtype,
            blocksize=64,
            code=torch.empty(16),
            quant_type="nf4",
            offset=torch.empty(()),
            state2=nested,
        )
        weight.compress_statistics, weight.quant_type = True, "nf4"
        self.weight = weight
        self.bias, self.quant_state = None, None
        self.compute_dtype, self.compute_type_is_set = dtype, True
        self.support_avx512bf16_for_cpu = False


@contextmanager
def gpu_autocast(enabled: bool) -> Iterator[None]:
    """Make `torch.is_autocast_enabled()` report a GPU's autocast, as PEFT calls it, without a device.

    With a device it reports the real state, which `torch.autocast` saves and restores.
    """
    real = torch.is_autocast_enabled
    with patch("torch.is_autocast_enabled", lambda *device: real(*device) if device else enabled):
        yield


@contextmanager
def fake_model(config: LlamaConfig, rank: int, checkpointing: bool, autocast: bool) -> Iterator[PeftModel]:
    """Create a bfloat16 model with a float32 adapter, of fake tensors; inside the context all new tensors are fake.

    Args:
        autocast: whether PEFT finds autocast active, as on a GPU.
    """
    dtype = torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True), gpu_autocast(autocast):
        model = cast(LlamaForCausalLM, LlamaForCausalLM._from_config(config, dtype=dtype))
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, FakeLinear4bit(module, dtype))
        model.requires_grad_(False)
        cast(Any, model).is_loaded_in_4bit = True  # PEFT looks for this
        with patch.object(nn.Module, "to", lambda self, *_, **__: self):  # fake parameters cannot be moved
            adapted = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        yield adapted.train()


def counted_step(
    config: LlamaConfig, rows: int, length: int, rank: int, checkpointing: bool, autocast: bool
) -> tuple[int, int]:
    """Return the bytes, beyond weights and adapter, that the backbone keeps for its backward pass, and the peak.

    The attention mask is materialized, as for padded rows: fake tensors have no values that show it is not needed.
    """
    with fake_model(config, rank, checkpointing, autocast) as model:
        live = LiveTensors()
        live.ignore(model.parameters())
        ids = torch.zeros(rows, length, dtype=torch.long)
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                backbone = base_of(model).base_model
                loss = backbone(input_ids=ids, use_cache=False).last_hidden_state.sum()
            kept = live.live
            loss.backward()
        return kept, live.peak
