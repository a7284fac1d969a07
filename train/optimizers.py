"""The optimiser of a stage: AdamW, or Muon for the matrices inside the transformer blocks and AdamW for the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from .config import StageConfig

# Parameters that are looked up or added, not multiplied: no weight decay on them.
NO_DECAY = ("position", "queries", "mask_tokens", "codebook", "embed.weight", "embedding", "table")
IN_BLOCK = re.compile(r"\.\d+\.")  # encoder.0.attn.to_qkv.weight: a part of a stack of layers


class Joint(Optimizer):
    """Optimisers of different parameters as one, so that whoever steps, saves or clips them need not know."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        self.defaults = parts[0].defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, Any]:
        return {key: value for part in self.parts for key, value in part.state.items()}

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def make_optimizer(model: nn.Module, stage: StageConfig) -> Optimizer:
    """The stage's optimiser, with weight decay on matrices only: not on norms, biases, embeddings or the codebook.

    With `stage.optimizer` "muon" the weight matrices of the blocks take orthogonalised steps (Jordan et al., 2024),
    scaled to the size of AdamW's (Liu et al., 2025, section 2.2), so that both share a learning rate and a decay.
    """
    muon, decayed, others = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or any(part in name for part in NO_DECAY):
            others.append(parameter)
        elif stage.optimizer == "muon" and parameter.ndim == 2 and IN_BLOCK.search(name):
            muon.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = AdamW(groups, lr=stage.lr, betas=(stage.beta1, stage.beta2), fused=True)
    if not muon:
        return adamw
    return Joint(Muon(muon, lr=stage.lr, weight_decay=stage.weight_decay, adjust_lr_fn="match_rms_adamw"), adamw)
