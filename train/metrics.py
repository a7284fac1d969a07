"""How close two sets of images are, from a judge's features (n, d) and class probabilities (n, K): pure functions.

All of it is computed in float64 on the CPU. PSNR and SSIM of single images are `spectralar.analysis.psnr` and `ssim`.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # of a distance matrix held at a time


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of the Gaussians with the two sets' means and covariances (Heusel et al., 2017, equation 6).

        ||m_r - m_f||² + tr(S_r) + tr(S_f) - 2 tr((S_r S_f)^(1/2))

    The last trace is the sum of the roots of the eigenvalues of S_r^(1/2) S_f S_r^(1/2), which is symmetric: no
    square root of a general matrix, hence no complex results and no trouble with singular covariances.

    Args:
        real, fake: features (n, d) and (m, d), n and m at least 2.

    Raises:
        ValueError: if the shapes are not these or a feature is not finite.
    """
    real, fake = _features(real, "real"), _features(fake, "fake")
    _same_width(real, fake)
    # correction=1 as in the reference implementations (numpy.cov).
    real_cov, fake_cov = torch.cov(real.T).reshape(real.shape[1], -1), torch.cov(fake.T).reshape(fake.shape[1], -1)
    values, vectors = torch.linalg.eigh(real_cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # S_r^(1/2)
    product = root @ fake_cov @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (real.mean(0) - fake.mean(0)).square().sum() + real_cov.trace() + fake_cov.trace() - 2 * cross
    return max(0.0, float(distance))  # of equal sets, rounding may leave -1e-15


def manifold_metrics(real: Tensor, fake: Tensor, k: int = 3, density_k: int = 5) -> dict[str, float]:
    """How much of each set lies where the other one is, in balls that reach to the k-th nearest neighbour.

    "precision": share of fake points inside some real point's ball; "recall": share of real points inside some fake
    point's ball (Kynkäänniemi et al., 2019, equations 1 and 2; k = 3 there). "density": real balls around a fake
    point, on average, over k; may exceed 1; "coverage": share of real points whose ball holds a fake point (Naeem et
    al., 2020, equations 4 and 6; k = 5 there). All depend on the numbers of points: compare equal ones only.

    Args:
        real, fake: features (n, d) and (m, d), more than k and density_k each.

    Raises:
        ValueError: if the shapes are not these or a feature is not finite.
    """
    real, fake = _features(real, "real", max(k, density_k) + 1), _features(fake, "fake", max(k, density_k) + 1)
    _same_width(real, fake)
    real_radii, fake_radii = _radii(real, (k, density_k)), _radii(fake, (k,))
    in_real = torch.zeros(len(fake), dtype=torch.bool)
    in_fake, covered, balls = [], [], 0
    for start in range(0, len(real), ROWS):
        rows = slice(start, start + ROWS)
        distance = torch.cdist(real[rows], fake)  # (rows, m)
        in_real |= (distance <= real_radii[rows, :1]).any(dim=0)
        in_fake.append((distance <= fake_radii[:, 0]).any(dim=1))
        inside = distance <= real_radii[rows, 1:]
        covered.append(inside.any(dim=1))
        balls += int(inside.sum())
    return {
        "precision": float(in_real.double().mean()),
        "recall": float(torch.cat(in_fake).double().mean()),
        "density": balls / (density_k * len(fake)),
        "coverage": float(torch.cat(covered).double().mean()),
    }


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al., 2016): class probabilities (n, K) -> 1..K.

    Over all images at once: the custom of averaging ten splits only adds bias.

    Raises:
        ValueError: if rows are not probabilities.
    """
    p = probabilities.detach().cpu().double()
    if p.ndim != 2 or not len(p) or not torch.allclose(p.sum(1), p.new_ones(()), atol=1e-3) or bool((p < 0).any()):
        raise ValueError(f"probabilities must be (n, K) with rows that add up to 1, got shape {tuple(p.shape)}.")
    # mean KL = H(mean p) - mean H(p)
    return float((torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()).exp())


def _features(x: Tensor, name: str, least: int = 2) -> Tensor:
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"{name} features must have shape (n, d) with n of at least {least}, got {tuple(x.shape)}.")
    x = x.detach().cpu().double()
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} features must be finite: {int((~x.isfinite()).sum())} are not.")
    return x


def _same_width(real: Tensor, fake: Tensor) -> None:
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real and fake features must be of one width, got {real.shape[1]} and {fake.shape[1]}.")


def _radii(x: Tensor, neighbours: tuple[int, ...]) -> Tensor:
    """Distance from each point to its k-th nearest other point, for each k: (n, d) -> (n, len(neighbours))."""
    parts = []
    for start in range(0, len(x), ROWS):
        distance = torch.cdist(x[start : start + ROWS], x)
        distance[torch.arange(len(distance)), torch.arange(start, start + len(distance))] = torch.inf  # itself
        nearest = distance.topk(max(neighbours), largest=False).values  # (rows, k), ascending
        parts.append(nearest[:, [k - 1 for k in neighbours]])
    return torch.cat(parts)
