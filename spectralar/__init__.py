"""Unofficial implementation of SpectralAR, Spectral Autoregressive Visual Generation (arXiv 2506.10962)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import SpectralARPipeline
    from .tokenizer import SpectralTokenizer
    from .transformer import SpectralARTransformer

__version__ = "0.1.0"

__all__ = ["SpectralARPipeline", "SpectralARTransformer", "SpectralTokenizer", "__version__"]

_MODULES = {"SpectralARPipeline": "pipeline", "SpectralARTransformer": "transformer", "SpectralTokenizer": "tokenizer"}


def __getattr__(name: str) -> Any:
    # Imported when they are first used: torch and diffusers take seconds, and a command line's mistake needs neither.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
