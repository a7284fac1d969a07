"""Fully sharded data parallelism (FSDP2): of weights, gradients, moments and averages each process holds a part.

torch's own `fully_shard`, since accelerate's FSDP passes over processes without GPUs without a word. What is saved is
whole, in the same files as without sharding: a run goes on in any number of processes, sharded or not.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map


def shard(model: nn.Module, device: torch.device, processes: int) -> None:
    """Leaves each process with its part of every weight of a model that is equal on all of them; in place.

    Blocks gather their weights one by one, where they run by their own `forward`; the tokenizer's decoder, whose
    parts are called apart, gathers with the rest of the model.
    """
    mesh = init_device_mesh(device.type, (processes,))
    model.to(device)
    for block in [*getattr(model, "blocks", ()), *getattr(model, "encoder", ())]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model._register_state_dict_hook(lambda module, state, prefix, metadata: tree_map(whole, dict(state)))
    model.register_load_state_dict_pre_hook(_split_weights)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole(x: Any) -> Any:
    """A tensor of which processes have parts, whole in each; anything else as it is. Called by all processes."""
    if not isinstance(x, DTensor):
        return x
    full = x.full_tensor()
    # Uneven parts are gathered with padding, which would be saved with it.
    return full.clone() if full.untyped_storage().nbytes() > full.nbytes else full


def part_of(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as `like` is; x itself if that is whole too."""
    if not isinstance(like, DTensor) or isinstance(x, DTensor):
        return x
    # No source: each process has read the same file.
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard_state(optimizer: Optimizer) -> None:
    """Has an optimiser of sharded weights save its state whole, and take it so."""
    for part in getattr(optimizer, "parts", [optimizer]):
        part.register_state_dict_post_hook(lambda _, state: tree_map(whole, state))
        part.register_load_state_dict_pre_hook(_split_moments)


def _split_weights(model: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    for name, parameter in model.named_parameters():
        if name in state:
            state[name] = part_of(state[name], parameter)


def _split_moments(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: part_of(x, parameters[index]) if getattr(x, "shape", None) == parameters[index].shape else x
            for name, x in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}


class ShardedAverage(EMAModel):
    """Average of sharded weights, itself in shards; saved whole."""

    def __init__(self, parameters: list[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, **options)
        self._like = parameters

    def state_dict(self) -> dict[str, Any]:
        return tree_map(whole, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.shadow_params = [part_of(x, like) for x, like in zip(self.shadow_params, self._like, strict=True)]


def averaged_copy(model: nn.Module, average: EMAModel, averaged: list[nn.Parameter]) -> nn.Module:
    """A whole model with the averaged weights where there are any, to measure or to publish. By all processes."""
    values = dict(zip(map(id, averaged), average.shadow_params, strict=True))
    state = {name: whole(values.get(id(p), p)).detach() for name, p in model.named_parameters()}
    copy = type(model).from_config(model.config).to(model.device)
    copy.load_state_dict(state, strict=False)  # buffers that are saved: none
    return copy
