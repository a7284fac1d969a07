"""Unofficial implementation of SpectralAR, Spectral Autoregressive Visual Generation (arXiv 2506.10962)."""
