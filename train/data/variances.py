"""How much the DCT coefficients of a data set vary: what reverse water-filling starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from spectralar.spectral import dct2

from .images import ImageSet, Prefetch, to_float

IMAGES, BATCH = 20_000, 256  # a variance of so many images is known to one per cent


def dct_variances(sources: Sequence[ImageSet], shares: Sequence[float] = (1,), count: int = IMAGES) -> Tensor:
    """Variances (C, H, H) of the DCT coefficients of images in [-1, 1], along the principal axes of their colours.

    Args:
        sources: sets of images, which together are one.
        shares: in which proportion.
        count: of how many images of each, spread evenly.
    """
    moments = [_moments(source, count) for source in sources]
    mean, products = (
        sum(share * moment for share, moment in zip(shares, kind, strict=True)) / sum(shares)
        for kind in zip(*moments, strict=True)
    )
    covariance = products - torch.einsum("cuv,duv->uvcd", mean, mean)  # (H, H, C, C)
    return torch.linalg.eigvalsh(covariance).clamp(min=0).permute(2, 0, 1)  # (C, H, H)


def _moments(data: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """Means over images of the spectra (C, H, H), and of the products of their colours (H, H, C, C)."""
    batches = data.evenly(count).split(BATCH)
    fetch = Prefetch(lambda i: data.gather(batches[i]) if i < len(batches) else None)
    mean, products = 0.0, 0.0
    with tqdm(total=sum(map(len, batches)), desc="variances", unit="img", leave=False) as bar:
        for i in range(len(batches)):
            spectra = dct2(to_float(fetch(i))).double()  # (b, C, H, H)
            mean += spectra.sum(dim=0) / bar.total
            products += torch.einsum("bcuv,bduv->uvcd", spectra, spectra) / bar.total
            bar.update(len(spectra))
    return mean, products
