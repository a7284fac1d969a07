"""Early stopping: ends a run whose held-out loss no longer falls, and keeps the weights of the lowest one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class EarlyStopping:
    """Watches a held-out loss; all of it is in the checkpoints of the run.

    Args:
        patience: measurements in a row without a new lowest loss after which the run is over; 0: never, and no
            weights are kept.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.lowest, self.step, self.waited = math.inf, 0, 0
        self._weights: list[Tensor] = []  # on the CPU

    @property
    def over(self) -> bool:
        return 0 < self.patience <= self.waited

    def update(self, loss: float, parameters: list[nn.Parameter], step: int) -> None:
        """Takes a measurement of `parameters` after `step` steps."""
        if not self.patience:
            return
        if loss < self.lowest:
            self.lowest, self.step, self.waited = loss, step, 0
            self._weights = [p.detach().to("cpu", copy=True) for p in parameters]
        else:
            self.waited += 1

    @torch.no_grad()
    def copy_to(self, parameters: list[nn.Parameter]) -> None:
        """Puts the weights of the lowest loss in place, if there are any."""
        for parameter, kept in zip(parameters, self._weights or parameters, strict=True):
            parameter.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self.lowest, "step": self.step, "waited": self.waited, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lowest, self.step, self.waited = state["lowest"], state["step"], state["waited"]
        self._weights = state["weights"]
