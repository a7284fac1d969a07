"""The optimiser of a stage: AdamW, or Muon for the matrices inside the transformer blocks and AdamW for the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..configs.config import StageConfig
from .hardware import fast_dtype
from .sharding import part_of, whole

# Parameters that are looked up or added, not multiplied: no weight decay on them.
NO_DECAY = ("position", "queries", "mask_tokens", "codebook", "embed.weight", "embedding", "table", "entry_maps")
IN_BLOCK = re.compile(r"\.\d+\.")  # encoder.0.attn.to_qkv.weight: a part of a stack of layers


def orthogonalise(x: Tensor, rounds: int = 5) -> Tensor:
    """The matrix (m, n) with all its singular values brought to between 0.7 and 1.2, in the type products are fast in.

    x <- (a + b g + c g^2) x with g = x x^T, the quintic Newton-Schulz iteration of Jordan et al., 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = (x.mT if tall else x).to(fast_dtype(x.device))
    x = x / x.norm().clamp(min=1e-7)
    gram = x @ x.mT
    # All factors are polynomials of the first g and commute: of a long matrix they are multiplied among themselves,
    # which is a third less work, but squares what g was rounded by. bfloat16 has not enough digits for that.
    factors, long = None, x.shape[1] >= 2 * x.shape[0] and x.dtype != torch.bfloat16
    for i in range(rounds):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        if long:
            factor.diagonal().add_(a)
            factors = factor if factors is None else factor @ factors
            gram = factor @ gram @ factor if i + 1 < rounds else gram
        else:
            x = torch.addmm(x, factor, x, beta=a)
            gram = x @ x.mT if i + 1 < rounds else gram
    x = factors @ x if long else x
    return x.mT if tall else x


class Muon(Optimizer):
    """Momentum SGD whose steps are orthogonalised (Jordan et al., 2024), as large as AdamW's (Liu et al., 2025).

        m <- mu m + (1 - mu) g,   w <- (1 - lr decay) w - 0.2 lr sqrt(max(w.shape)) orthogonalise(mu m + (1 - mu) g)

    `torch.optim.Muon` with "match_rms_adamw", whose state it takes, but for the type: that one orthogonalises in
    bfloat16 everywhere, which takes twenty times as long where the CPU has no instructions for it.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                # Each process of a sharded run orthogonalises the whole matrix.
                update = part_of(orthogonalise(whole(p.grad.lerp(buffer, momentum))).to(p.dtype), p)
                p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-0.2 * lr * math.sqrt(max(p.shape)))


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

    With `stage.optimizer` "muon" the weight matrices of the blocks take `Muon`'s steps, which are of the size of
    AdamW's (Liu et al., 2025, section 2.2), so that both share a learning rate and a decay.
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
    return Joint(Muon(muon, stage.lr, stage.weight_decay), adamw)
