"""A frozen 4-bit base whose decoder layers are sharded over processes: PyTorch's FSDP2 without its training part.

Each process holds a part of every layer's weights, and gathers a layer when it is computed. Embeddings, head, norms
outside the layers and the 4-bit constants are whole in every process, and so are adapters, which are attached later and
trained by DDP as usual. So nothing that is trained is sharded, and gates, optimizers and checkpoints are those of DDP.
Every forward pass is one of all processes: `Processes.readers` says what follows.

`fully_shard` is called directly, not through accelerate: its plugin does nothing on CPUs, shards adapters too, and
leaves 4-bit weights that are stored as bytes unsharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import bitsandbytes as bnb
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from folora_q.distributed.processes import Processes
from folora_q.errors import RunError

Module = TypeVar("Module", bound=nn.Module)


def mesh_of(processes: Processes) -> DeviceMesh:
    """Return the mesh of all processes' devices; all of them must call this together."""
    return init_device_mesh(processes.device.type, (processes.count,))


def shard_base(model: PreTrainedModel, mesh: DeviceMesh, offload: bool = False) -> None:
    """Shard the weights of a model's decoder layers; everything else moves to the process's device.

    Args:
        model: frozen, with its weights in the host's memory, equal in all processes.
        mesh: from `mesh_of`.
        offload: keep the shards in the host's memory, from where they are copied when they are needed.

    Raises:
        RunError: transformers does not mark the decoder layers of this model.
    """
    layers = {name: each for name, each in model.named_modules() if isinstance(each, GradientCheckpointingLayer)}
    if not layers:
        raise RunError(f"{type(model).__name__} cannot be sharded: its decoder layers are not marked as such")
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    packed = {layer: _attributes(layer) for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)}
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    outside = {parameter for parameter in model.parameters() if id(parameter) not in inside}
    for tensor in (*outside, *model.buffers()):
        tensor.data = tensor.data.to(device)
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for layer in layers.values():
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    backbone = model.get_submodule(_common_parent(list(layers)))
    fully_shard(backbone, mesh=mesh, ignored_params=outside, offload_policy=policy)  # has no weights, gathers in turn
    for layer, attributes in packed.items():
        attributes["quant_state"].to(device)
        layer.quant_state = attributes["quant_state"]  # which bitsandbytes gives the gathered weight
        for name, value in attributes.items():
            setattr(layer.weight, name, value)
    vars(model)["hf_device_map"] = {"": device}  # which accelerate checks


def train_without_base(model: nn.Module) -> None:
    """Let DDP ignore a sharded base: it would compare and broadcast weights, of which each process has a part."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])


def with_weights(model: nn.Module, modules: Iterable[Module]) -> Iterator[Module]:
    """Yield modules of a model with their complete weights; of a sharded one, a decoder layer is gathered at a time."""
    owners = {part: layer for layer in model.modules() if isinstance(layer, FSDPModule) for part in layer.modules()}
    gathered: FSDPModule | None = None
    for module in modules:
        if (owner := owners.get(module)) is not gathered:
            if gathered is not None:
                gathered.reshard()
            if owner is not None:
                owner.unshard()
            gathered = owner
        yield module
    if gathered is not None:
        gathered.reshard()


def _attributes(layer: bnb.nn.Linear4bit) -> dict[str, Any]:
    """Return what PEFT reads from a 4-bit weight, which is a plain tensor once it is sharded."""
    return {name: getattr(layer.weight, name) for name in ("quant_state", "quant_type", "compress_statistics")}


def _common_parent(names: list[str]) -> str:
    """Return the innermost module that contains all layers, and the list that they are in."""
    first, *others = (name.split(".")[:-2] for name in names)
    common = 0
    while common < len(first) and all(len(each) > common and each[common] == first[common] for each in others):
        common += 1
    return ".".join(first[:common])
