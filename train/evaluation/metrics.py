"""How close two sets of images are, from a judge's features (n, d) and class probabilities (n, K): pure functions.

All of it is computed in float64 on the CPU. PSNR and SSIM of single images are `psnr` and `ssim` of
`spectralar.analysis.quality`.

Standard errors say how far a figure would move with another draw of the images. They come from the figure's
derivative with respect to the weight of each image (the infinitesimal jackknife; Efron, 1982, chapter 6): what
bootstrap resampling converges to, at the price of one evaluation instead of hundreds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1024  # of a distance matrix held at a time
INTERVAL = 1.96  # standard errors either side that make up 95 %
MANIFOLD_K, DENSITY_K = 3, 5  # neighbours that balls reach to
LEAST_MANIFOLD = DENSITY_K + 1  # points of a set in which every one has so many neighbours
MANIFOLD = ("precision", "recall", "density", "coverage")


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    error: float


def mean(values: Tensor) -> Estimate:
    """The mean of one value an image, (n,) numbers or bools."""
    values = values.detach().cpu().double()
    return Estimate(float(values.mean()), _error(values - values.mean()))


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
    return _frechet(*_pair(real, fake))[0]


def frechet_estimate(real: Tensor, fake: Tensor, paired: bool = False) -> Estimate:
    """`frechet_distance` with its standard error over draws of both sets.

    Args:
        real, fake: features (n, d) and (m, d).
        paired: whether fake image i was made of real image i; the two then move together.

    Raises:
        ValueError: as `frechet_distance`.
    """
    real, fake = _pair(real, fake)
    distance, to_real, to_fake = _frechet(real, fake)
    influence = _influence(real, fake, to_fake), _influence(fake, real, to_real)
    if paired:
        return Estimate(distance, _error(influence[0] + influence[1]))
    return Estimate(distance, math.hypot(*map(_error, influence)))


def _frechet(real: Tensor, fake: Tensor) -> tuple[float, Tensor, Tensor]:
    """The distance, and the maps (d, d) that carry the fake Gaussian onto the real one and back.

    With A = S_r^(1/2) and M = A S_f A these are A M^(-1/2) A and A^(-1) M^(1/2) A^(-1) (Peyré and Cuturi, 2019,
    section 2.6). Where a set does not vary the inverses are 0.
    """
    # correction=1 as in the reference implementations (numpy.cov).
    real_cov, fake_cov = (torch.cov(x.T).reshape(x.shape[1], -1) for x in (real, fake))
    root, inverse_root = _powers(real_cov, 0.5, -0.5)
    cross, inverse_cross = _powers(root @ fake_cov @ root, 0.5, -0.5)
    distance = (real.mean(0) - fake.mean(0)).square().sum()
    distance += real_cov.trace() + fake_cov.trace() - 2 * cross.trace()
    # Of equal sets, rounding may leave -1e-15.
    return max(0.0, float(distance)), root @ inverse_cross @ root, inverse_root @ cross @ inverse_root


def _influence(own: Tensor, other: Tensor, to_other: Tensor) -> Tensor:
    """Derivative of the distance by the weight of each point of one set, (n,): its mean is 0."""
    centred = own - own.mean(0)
    grown = centred.square().sum(1) - (centred @ to_other * centred).sum(1)
    return 2 * centred @ (own.mean(0) - other.mean(0)) + grown - grown.mean()


def _powers(matrix: Tensor, *exponents: float) -> list[Tensor]:
    """Powers of a symmetric positive semi-definite matrix; what is 0 but for rounding stays 0 under all of them."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return [(vectors * torch.where(kept, values, 1.0).pow(e) * kept) @ vectors.T for e in exponents]


def _error(influence: Tensor) -> float:
    """Standard error of a figure, from its derivatives (n,) by the weight of each point."""
    return float(influence.std() / math.sqrt(len(influence)))


def manifold_metrics(real: Tensor, fake: Tensor, k: int = MANIFOLD_K, density_k: int = DENSITY_K) -> dict[str, float]:
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
    return {name: estimate.value for name, estimate in manifold_estimates(real, fake, k, density_k).items()}


def manifold_estimates(
    real: Tensor, fake: Tensor, k: int = MANIFOLD_K, density_k: int = DENSITY_K
) -> dict[str, Estimate]:
    """`manifold_metrics` with standard errors over draws of the points that are counted; the balls are taken as given.

    Raises:
        ValueError: as `manifold_metrics`.
    """
    real, fake = _pair(real, fake, max(k, density_k) + 1)
    real_radii, fake_radii = _radii(real, (k, density_k)), _radii(fake, (k,))
    in_real = torch.zeros(len(fake), dtype=torch.bool)
    balls = torch.zeros(len(fake), dtype=torch.long)
    in_fake, covered = [], []
    for start in range(0, len(real), ROWS):
        rows = slice(start, start + ROWS)
        distance = torch.cdist(real[rows], fake)  # (rows, m)
        in_real |= (distance <= real_radii[rows, :1]).any(dim=0)
        in_fake.append((distance <= fake_radii[:, 0]).any(dim=1))
        inside = distance <= real_radii[rows, 1:]
        covered.append(inside.any(dim=1))
        balls += inside.sum(dim=0)
    return {
        "precision": mean(in_real),
        "recall": mean(torch.cat(in_fake)),
        "density": mean(balls / density_k),
        "coverage": mean(torch.cat(covered)),
    }


def nearest(points: Tensor, among: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest of `among` (m, d) to each of `points` (n, d): distances and places (n, k), nearest first.

    Found in float32, since pixels of whole data sets are many; the distances themselves are exact to it, so that a
    copy has 0.

    Raises:
        ValueError: if there are fewer than k.
    """
    if len(among) < k:
        raise ValueError(f"{k} neighbours cannot be found among {len(among)}.")
    distances, places = [], []
    for rows in points.float().split(ROWS):
        best, place = rows.new_empty(len(rows), 0), rows.new_empty(len(rows), 0, dtype=torch.long)
        for start in range(0, len(among), 8 * ROWS):
            distance = torch.cdist(rows, among[start : start + 8 * ROWS].to(rows))  # (rows, m)
            here = torch.arange(start, start + distance.shape[1], device=rows.device).expand_as(distance)
            best, order = torch.cat([best, distance], dim=1).topk(min(k, start + distance.shape[1]), largest=False)
            place = torch.cat([place, here], dim=1).gather(1, order)
        exact = (rows.unsqueeze(1) - among[place.to(among.device)].to(rows)).norm(dim=2)
        exact, order = exact.sort(dim=1)
        distances.append(exact.cpu())
        places.append(place.gather(1, order).cpu())
    return torch.cat(distances), torch.cat(places)


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al., 2016): class probabilities (n, K) -> 1..K.

    Over all images at once: the custom of averaging ten splits only adds bias.

    Raises:
        ValueError: if rows are not probabilities.
    """
    return inception_score_estimate(probabilities).value


def inception_score_estimate(probabilities: Tensor) -> Estimate:
    """`inception_score` with its standard error.

    Raises:
        ValueError: as `inception_score`.
    """
    p = probabilities.detach().cpu().double()
    if p.ndim != 2 or not len(p) or not torch.allclose(p.sum(1), p.new_ones(()), atol=1e-3) or bool((p < 0).any()):
        raise ValueError(f"probabilities must be (n, K) with rows that add up to 1, got shape {tuple(p.shape)}.")
    marginal, entropy = p.mean(0), torch.special.entr(p).sum(1)
    # mean KL = H(mean p) - mean H(p)
    score = float((torch.special.entr(marginal).sum() - entropy.mean()).exp())
    influence = -torch.special.xlogy(p, marginal).sum(1) - entropy  # of the logarithm, but for a constant
    return Estimate(score, score * _error(influence))


def _features(x: Tensor, name: str, least: int = 2) -> Tensor:
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"{name} features must have shape (n, d) with n of at least {least}, got {tuple(x.shape)}.")
    x = x.detach().cpu().double()
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} features must be finite: {int((~x.isfinite()).sum())} are not.")
    return x


def _pair(real: Tensor, fake: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    real, fake = _features(real, "real", least), _features(fake, "fake", least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real and fake features must be of one width, got {real.shape[1]} and {fake.shape[1]}.")
    return real, fake


def _radii(x: Tensor, neighbours: tuple[int, ...]) -> Tensor:
    """Distance from each point to its k-th nearest other point, for each k: (n, d) -> (n, len(neighbours))."""
    parts = []
    for start in range(0, len(x), ROWS):
        distance = torch.cdist(x[start : start + ROWS], x)
        distance[torch.arange(len(distance)), torch.arange(start, start + len(distance))] = torch.inf  # itself
        nearest = distance.topk(max(neighbours), largest=False).values  # (rows, k), ascending
        parts.append(nearest[:, [k - 1 for k in neighbours]])
    return torch.cat(parts)
