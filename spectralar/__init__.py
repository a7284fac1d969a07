"""Unofficial implementation of SpectralAR, Spectral Autoregressive Visual Generation (arXiv 2506.10962)."""

from .pipeline import SpectralARPipeline
from .tokenizer import SpectralTokenizer
from .transformer import SpectralARTransformer

__version__ = "0.1.0"

__all__ = ["SpectralARPipeline", "SpectralARTransformer", "SpectralTokenizer", "__version__"]
