"""Metrics of sets of images against closed forms, slow references and torchmetrics."""

import pytest
import scipy.linalg
import torch
from prdc import compute_prdc
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from spectralar.analysis.quality import psnr, ssim
from train.evaluation import metrics
from train.evaluation.metrics import (
    frechet_distance,
    frechet_estimate,
    inception_score,
    inception_score_estimate,
    manifold_estimates,
    manifold_metrics,
    mean,
    nearest,
)


def gaussian(n: int, mean: torch.Tensor, cov: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """n points whose sample mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


def random_covariance(d: int, seed: int) -> torch.Tensor:
    a = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


class Identity(torch.nn.Module):
    """What torchmetrics takes in place of Inception: features come in as they are."""

    num_features = 5

    def forward(self, x):
        return x


# ------------------------------------------------------------------------------------------- Fréchet distance


def test_frechet_distance_of_commuting_gaussians_has_a_closed_form():
    deviations = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.5, 0.5]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, -2.0], [0.5, 1.0, 2.0]], dtype=torch.float64)
    pairs = enumerate(zip(means, deviations, strict=True))
    real, fake = (gaussian(200, m, torch.diag(s**2), seed) for seed, (m, s) in pairs)
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(real, fake) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_of_any_gaussians_is_that_of_the_general_matrix_root():
    d = 6
    covs = random_covariance(d, 1), random_covariance(d, 2)
    means = torch.zeros(d, dtype=torch.float64), torch.linspace(-1, 1, d, dtype=torch.float64)
    real, fake = (gaussian(100, m, c, seed) for seed, (m, c) in enumerate(zip(means, covs, strict=True)))
    root = scipy.linalg.sqrtm((covs[0] @ covs[1]).numpy()).real  # not symmetric: the two do not commute
    expected = means[1].square().sum() + covs[0].trace() + covs[1].trace() - 2 * root.trace()
    assert frechet_distance(real, fake) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(fake, real) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_equals_that_of_torchmetrics():
    real, fake = torch.randn(300, 5), torch.randn(200, 5) @ torch.randn(5, 5) + 0.3
    reference = FrechetInceptionDistance(feature=Identity(), input_img_size=(5,)).set_dtype(torch.float64)
    reference.update(real.double(), real=True)
    reference.update(fake.double(), real=False)
    assert frechet_distance(real, fake) == pytest.approx(float(reference.compute()), rel=1e-3)


def test_frechet_distance_with_fewer_points_than_dimensions():
    x = torch.randn(20, 50, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 2) == pytest.approx(4 * 50, rel=1e-6)  # the covariances cancel, singular or not
    assert frechet_distance(x, 3 * x - 2 * x.mean(0)) == pytest.approx(4 * float(torch.cov(x.T).trace()), rel=1e-6)


# ------------------------------------------------------------------------------------------- manifolds


def slow_manifold_metrics(real, fake, k: int, density_k: int) -> dict:
    """The papers' formulas, point by point."""
    distance = [[float((a - b).norm()) for b in fake] for a in real]

    def radius(points, i, k):
        return sorted(float((points[i] - b).norm()) for j, b in enumerate(points) if j != i)[k - 1]

    n, m = len(real), len(fake)
    reach = [radius(real, i, k) for i in range(n)]
    density_reach = [radius(real, i, density_k) for i in range(n)]
    fake_reach = [radius(fake, j, k) for j in range(m)]
    return {
        "precision": sum(any(distance[i][j] <= reach[i] for i in range(n)) for j in range(m)) / m,
        "recall": sum(any(distance[i][j] <= fake_reach[j] for j in range(m)) for i in range(n)) / n,
        "density": sum(distance[i][j] <= density_reach[i] for i in range(n) for j in range(m)) / (density_k * m),
        "coverage": sum(any(distance[i][j] <= density_reach[i] for j in range(m)) for i in range(n)) / n,
    }


@pytest.mark.parametrize(("n", "m"), [(40, 40), (60, 30)])
def test_manifold_metrics_equal_the_slow_reference(n, m, monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 7)  # several slices, the last one not full
    real, fake = torch.randn(n, 3, dtype=torch.float64), 1.5 * torch.randn(m, 3, dtype=torch.float64) + 0.5
    result = manifold_metrics(real, fake, k=2, density_k=4)
    assert result == pytest.approx(slow_manifold_metrics(real, fake, 2, 4))
    assert 0 < result["precision"] < 1 and 0 < result["recall"] < 1 and 0 < result["coverage"] < 1


@pytest.mark.parametrize("n", [80, 200])
def test_manifold_metrics_equal_those_of_prdc(n, capsys):
    """Of its authors (Naeem et al., 2020), which takes one k for all four."""
    real, fake = torch.randn(200, 8), 1.2 * torch.randn(n, 8) + 0.3
    for k in (3, 5):
        expected = compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k)
        assert manifold_metrics(real, fake, k=k, density_k=k) == pytest.approx(expected, abs=1e-3)


def test_manifold_metrics_tell_dropped_modes_from_bad_samples():
    mode, other = torch.randn(60, 4), torch.randn(60, 4) + 100
    real = torch.cat([mode, other])
    same = manifold_metrics(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    dropped = manifold_metrics(real, torch.randn(120, 4))  # good samples of one mode only
    assert dropped["precision"] > 0.6 and dropped["recall"] < 0.51 and dropped["coverage"] < 0.51
    bad = manifold_metrics(real, torch.randn(120, 4) - 50)
    assert set(bad.values()) == {0.0}


# ------------------------------------------------------------------------------------------- inception score


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`", "ignore:std()")
def test_inception_score():
    assert inception_score(torch.eye(7).repeat(3, 1)) == pytest.approx(7)  # certain and even: as many as classes
    assert inception_score(torch.full((5, 4), 0.25)) == pytest.approx(1)
    assert inception_score(torch.tensor([[0.9, 0.1]] * 6)) == pytest.approx(1)  # always the same
    logits = 2 * torch.randn(200, 5)
    reference = InceptionScore(feature=Identity(), splits=1)
    reference.update(logits)
    assert inception_score(logits.softmax(1)) == pytest.approx(float(reference.compute()[0]), rel=1e-4)


# ------------------------------------------------------------------------------------------- standard errors


def bootstrap(measure, *sets: torch.Tensor, paired: bool = False, times: int = 400) -> float:
    """Standard deviation of a measure over resampled sets."""
    values = []
    for _ in range(times):
        chosen = [torch.randint(len(x), (len(x),)) for x in sets]
        values.append(measure(*(x[c] for x, c in zip(sets, chosen[:1] * 2 if paired else chosen, strict=False))))
    return float(torch.tensor(values).std())


def test_standard_error_of_the_frechet_distance_is_that_of_the_bootstrap():
    # Skewed, so that a mean and a variance move together; 1.5 times as far out, so that the two add up.
    real, fake = torch.randn(600, 4), 1.5 * torch.empty(400, 4).exponential_()
    estimate = frechet_estimate(real, fake)
    assert estimate.value == frechet_distance(real, fake)
    assert estimate.error == pytest.approx(bootstrap(frechet_distance, real, fake), rel=0.15)


def test_standard_error_of_pairs_leaves_out_what_they_share():
    real = 3 * torch.randn(500, 3)
    fake = 0.8 * real + 0.3 * torch.randn(500, 3)
    estimate = frechet_estimate(real, fake, paired=True)
    assert estimate.error == pytest.approx(bootstrap(frechet_distance, real, fake, paired=True), rel=0.15)
    assert estimate.error < 0.5 * frechet_estimate(real, fake).error


def test_standard_error_with_fewer_points_than_dimensions_is_finite():
    estimate = frechet_estimate(torch.randn(12, 30), torch.randn(15, 30) + 1)
    assert 0 < estimate.error < estimate.value


def test_standard_error_of_the_inception_score_is_that_of_the_bootstrap():
    p = (2 * torch.randn(500, 6)).softmax(dim=1)
    estimate = inception_score_estimate(p)
    assert estimate.value == inception_score(p)
    assert estimate.error == pytest.approx(bootstrap(inception_score, p), rel=0.15)


def test_standard_errors_of_shares_and_means():
    hits = torch.arange(100) < 20
    assert mean(hits).value == pytest.approx(0.2)
    assert mean(hits).error == pytest.approx((0.2 * 0.8 / 99) ** 0.5)
    real, fake = torch.randn(60, 3), torch.randn(50, 3) + 1
    for name, points in (("precision", 50), ("recall", 60), ("coverage", 60)):
        share, error = manifold_estimates(real, fake)[name]
        assert 0 < share < 1
        assert error == pytest.approx((share * (1 - share) / (points - 1)) ** 0.5)


def test_about_95_of_100_intervals_hold_the_true_distance():
    """Of two Gaussians whose distance is known; with many points, since the estimate is too high with few."""
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        real, fake = (torch.randn(2000, 2, generator=generator) for _ in range(2))
        value, error = frechet_estimate(real, 1.5 * fake + 1)
        held += abs(value - 2.5) < metrics.INTERVAL * error
    assert 89 <= held <= 99


# ------------------------------------------------------------------------------------------- neighbours


def test_nearest_finds_the_nearest_in_slices(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 3)
    points, among = torch.randn(10, 4), torch.randn(100, 4)  # several slices of both
    distance, place = nearest(points, among, k=3)
    expected = (points[:, None] - among).norm(dim=2).topk(3, largest=False)
    torch.testing.assert_close(distance, expected.values)
    assert place.tolist() == expected.indices.tolist()
    with pytest.raises(ValueError, match="3 neighbours cannot be found among 2"):
        nearest(points, among[:2], k=3)


def test_a_copy_has_distance_zero_though_its_numbers_are_large():
    among = torch.randn(50, 1000) + 1000
    distance, place = nearest(among[[7, 30]], among)
    assert distance.flatten().tolist() == [0, 0]
    assert place.flatten().tolist() == [7, 30]


# ------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("shape", [(4, 1, 32, 32), (4, 3, 64, 64)])
def test_psnr_and_ssim_of_images_equal_those_of_torchmetrics(shape):
    reference = torch.nn.functional.avg_pool2d(torch.randn(shape), 3, 1, 1).clamp(-1, 1)
    images = (reference + 0.2 * torch.randn(shape)).clamp(-1, 1)
    a, b = (images + 1) / 2, (reference + 1) / 2
    expected = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(images, reference), expected, rtol=0, atol=1e-3)
    # torchmetrics averages over reflected borders too; the published measure, and scikit-image, leave them out.
    _, maps = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)
    expected = maps[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    torch.testing.assert_close(ssim(images, reference), expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: frechet_distance(x[0], x), "real features must have shape"),
        (lambda x: frechet_distance(x, x[:1]), "fake features must have shape .* at least 2"),
        (lambda x: frechet_distance(x, x[:, :3]), "of one width, got 4 and 3"),
        (lambda x: frechet_distance(x, x / 0), "must be finite"),
        (lambda x: manifold_metrics(x[:5], x), "real features must have shape .* at least 6"),
        (lambda x: inception_score(x), "rows that add up to 1"),
    ],
)
def test_unfit_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(10, 4))
