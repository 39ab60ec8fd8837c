"""The bytes of all tensors that live while something runs, and of models that have shapes but no memory.

`LiveTensors` counts the storages that PyTorch's operations make, from their making to their end: what a GPU's allocator
counts, without a GPU. Under `FakeTensorMode` nothing is computed, so that a 7B model's step takes a second. It does not
see what an operation takes and gives back inside of itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
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

# mallopt(3): in a process of this environment an allocation of this size or more ends when it is freed.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class LiveTensors(TorchDispatchMode):
    """Counts bytes of storages made while it is on.

    Attributes:
        live: bytes now.
        peak: the most there were; may be put back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Leave out the storages of tensors that were there before."""
        self.sizes.update((tensor.untyped_storage()._cdata, 0) for tensor in tensors)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class FakeLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit layer of fake tensors, which bitsandbytes' own parameter class cannot hold."""

    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = module.in_features, module.out_features
        size = self.in_features * self.out_features
        blocks = -(-size // 64)
        nested = QuantState(
            absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
        )
        self.weight = nn.Parameter(torch.empty(size // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state = QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8),
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=dtype,
            blocksize=64,
            code=torch.empty(16),
            quant_type="nf4",
            offset=torch.empty(()),
            state2=nested,
        )
        self.weight.compress_statistics, self.weight.quant_type = True, "nf4"
        self.bias, self.quant_state = None, None
        self.compute_dtype, self.compute_type_is_set = dtype, True
        self.support_avx512bf16_for_cpu = False


@contextmanager
def gpu_autocast(enabled: bool) -> Iterator[None]:
    """PEFT, which asks for no device, is told whether a GPU's autocast is on.

    Who asks for a device is told the truth: `torch.autocast` puts back what it was told when it began.
    """
    real = torch.is_autocast_enabled
    with patch("torch.is_autocast_enabled", lambda *device: real(*device) if device else enabled):
        yield


@contextmanager
def fake_model(config: LlamaConfig, rank: int, checkpointing: bool, autocast: bool) -> Iterator[PeftModel]:
    """A model in bfloat16 with a float32 adapter, of fake tensors; while this lasts, all tensors made are fake.

    Args:
        autocast: PEFT finds it on, as on a GPU.
    """
    dtype = torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True), gpu_autocast(autocast):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, FakeLinear4bit(module, dtype))
        model.requires_grad_(False)
        model.is_loaded_in_4bit = True  # as PEFT asks
        with patch.object(nn.Module, "to", lambda self, *_, **__: self):  # fake parameters cannot be moved
            adapted = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        if checkpointing:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        yield adapted.train()


def counted_step(
    config: LlamaConfig, rows: int, length: int, rank: int, checkpointing: bool, autocast: bool
) -> tuple[int, int]:
    """Bytes beyond weights and adapter in a forward and a backward pass of the backbone: kept between, and the peak.

    The mask is there, as with padded rows: no value can be looked at that would say that it is not needed.
    """
    with fake_model(config, rank, checkpointing, autocast) as model:
        live = LiveTensors()
        live.ignore(model.parameters())
        ids = torch.zeros(rows, length, dtype=torch.long)
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                backbone = model.get_base_model().base_model
                loss = backbone(input_ids=ids, use_cache=False).last_hidden_state.sum()
            kept = live.live
            loss.backward()
        return kept, live.peak
