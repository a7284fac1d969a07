"""Components that move between host and device, or are cast, around each use of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock

import torch
from torch import nn

# Of all pipelines, as they may share components.
_OFFLOADING = RLock()


class Offloading:
    """For pipelines whose components are used by other methods than `forward`, which is all that hooks know of."""

    def _offloading(self) -> AbstractContextManager:
        """Around all that moves or casts components to and fro, or needs them as they are: one run at a time."""
        casts = any(getattr(model, "casts_weights", False) for model in (self.tokenizer, self.transformer))
        return _OFFLOADING if casts or hasattr(self, "_offload_device") else nullcontext()

    @contextmanager
    def _on_device(self, module: nn.Module) -> Iterator[None]:
        """A component on its device: as a whole under model offloading, all its parts under sequential offloading."""
        with self._offloading():
            parts = module.modules() if hasattr(module, "_hf_hook") else ()
            hooked = [part for part in parts if hasattr(part, "_hf_hook")]
            for part in hooked:
                part._hf_hook.pre_forward(part)
            try:
                yield
            finally:
                for part in hooked:
                    part._hf_hook.post_forward(part, None)

    @property
    def _execution_device(self) -> torch.device:
        with self._offloading():  # where another run ends, hooks are off for a moment
            return super()._execution_device

    def maybe_free_model_hooks(self) -> None:
        """As in the library: to be called at the end of a run."""
        with self._offloading():
            super().maybe_free_model_hooks()
