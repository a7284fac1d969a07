"""Made images that are like photos."""

import torch


def photo(channels: int, size: int, seed: int = 0) -> torch.Tensor:
    """An image (C, H, H) in [-1, 1] with a spectrum that falls as natural images' do."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.randn(channels, size, size, generator=generator, dtype=torch.float64)
    n = torch.arange(size)
    frequency = torch.minimum(n, size - n)
    x = torch.fft.ifft2(torch.fft.fft2(spectrum) / (1 + frequency[:, None] + frequency)).real
    return (x / x.abs().amax()).float()
