"""DCT, cutoffs, masks, band limiting and radial spectra, against scipy and closed forms."""

from decimal import ROUND_HALF_EVEN, Decimal
from itertools import product

import pytest
import torch
from scipy.fft import dctn, idctn

from spectralar.spectral import (
    band_energy,
    band_pass,
    bands,
    check_cutoffs,
    cutoff_schedule,
    data_cutoffs,
    dct2,
    dct_matrix,
    gaussian_psnr,
    idct2,
    low_pass,
    nested_targets,
    radial_frequency,
    radial_power_spectrum,
    square_frequency,
    square_mask,
    water_levels,
)

# DCT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(8, 8), (3, 32, 32), (2, 3, 64, 64), (2, 2, 1, 12, 20), (1, 1)])
def test_dct_is_scipys(shape, dtype, tolerance):
    x = 2 * torch.rand(shape, dtype=torch.float64) - 1
    for ours, theirs in ((dct2, dctn), (idct2, idctn)):
        expected = torch.from_numpy(theirs(x.numpy(), norm="ortho", axes=(-2, -1)))
        actual = ours(x.to(dtype))
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


def test_inverse_and_parseval():
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(idct2(dct2(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(dct2(x).square().sum((-2, -1)), x.square().sum((-2, -1)))


def test_a_batch_is_its_images():
    x = torch.randn(2, 3, 1, 16, 16, dtype=torch.float64)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        torch.testing.assert_close(dct2(x)[tuple(index)], dct2(x[tuple(index)]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "function", [dct2, idct2, lambda x: low_pass(x, 5), lambda x: low_pass(x, torch.tensor([5, 9, 5]))]
)
def test_half_precision_is_computed_in_float32(function, dtype):
    x = torch.randn(3, 1, 32, 32).to(dtype)
    assert torch.equal(function(x), function(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cutoff", [5, torch.tensor(5), torch.tensor([5, 9, 5])])
def test_autocast_changes_nothing(cutoff, dtype):
    x = torch.randn(3, 1, 32, 32).to(dtype)
    plain = dct2(x), idct2(x), low_pass(x, cutoff)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dct2(x), idct2(x), low_pass(x, cutoff)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_statistics_of_half_precision_are_float32():
    x = torch.randn(2, 3, 16, 16).bfloat16()
    power, energy = radial_power_spectrum(x)[1], band_energy(x, (4, 16))
    assert power.dtype == energy.dtype == torch.float32
    assert torch.equal(power, radial_power_spectrum(x.float())[1])
    assert torch.equal(energy, band_energy(x.float(), (4, 16)))


@pytest.mark.parametrize(
    "function", [dct2, idct2, lambda x: low_pass(x, 2), lambda x: low_pass(x, torch.tensor([2, 3]))]
)
def test_gradients(function):
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)


def test_a_matrix_first_made_in_inference_mode_can_be_trained_through():
    size = 23  # no other test uses it: the matrix is made here
    with torch.inference_mode():
        dct2(torch.zeros(1, size, size))
    x = torch.ones(1, size, size, requires_grad=True)
    dct2(x).sum().backward()
    assert x.grad is not None


def test_the_matrix_is_orthonormal():
    matrix = dct_matrix(48, torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-13)


# Cutoffs and masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1, 2, 3])
@pytest.mark.parametrize(("H", "N"), [(32, 64), (16, 32), (96, 64), (64, 16), (256, 64)])
def test_cutoffs_follow_the_formula_with_ties_to_even(H, N, alpha):
    # N is a power of two, so that both Decimal and float are exact and halves are really halves.
    exact = [Decimal(H) * (Decimal(k) / N) ** alpha for k in range(1, N + 1)]
    rounded = [int(value.quantize(Decimal(1), ROUND_HALF_EVEN)) for value in exact]
    assert list(cutoff_schedule(H, N, alpha)) == [min(H, max(1, r)) for r in rounded]


def test_halves_round_to_even():
    # H k / N = k / 2: 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, and 0.5 -> 0 is raised to 1.
    assert cutoff_schedule(4, 8, alpha=1.0) == (1, 1, 2, 2, 2, 3, 4, 4)


def test_cutoffs_of_the_default_model():
    cutoffs = cutoff_schedule(32, 32, 1.5)
    assert cutoffs[:8] == (1, 1, 1, 1, 2, 3, 3, 4)
    assert cutoffs[15] == round(32 * 0.5**1.5) == 11
    assert cutoffs[31] == 32


@pytest.mark.parametrize("cutoffs", [[1, 1, 8], [8, 8, 8], (3, 5, 8)])
def test_given_cutoffs_stay_as_they_are(cutoffs):
    assert check_cutoffs(cutoffs, 8, 3) == tuple(cutoffs)


@pytest.mark.parametrize(("cutoffs", "message"), [
    ([1, 8], "one number for each of the 3 tokens, got 2"), ([1, 2, 4, 8], "for each of the 3 tokens, got 4"),
    ([0, 4, 8], "from 1 to 8"), ([4, 3, 8], "none below the one before"), ([1, 2, 7], "the last one 8"),
    ([4, 9, 8], "from 1 to 8"), ([4, 4.5, 8], "whole numbers"), ([1, 9, 9], "from 1 to 8"),
])  # fmt: skip
def test_impossible_cutoffs(cutoffs, message):
    with pytest.raises(ValueError, match=message):
        check_cutoffs(cutoffs, 8, 3)


# Reverse water-filling ------------------------------------------------------------------------------------


def test_water_levels_in_closed_form():
    # At D = 4 the coefficients 16, 16 and 4 are worth 1, 1 and 0 bits; at D = 1 they take 2, 2 and 1, and 1 none.
    variances = torch.tensor([[16.0, 1.0], [4.0, 16.0]])
    levels = water_levels(variances, [0, 2, 5, 5 + 4 * 1.5, 1])
    torch.testing.assert_close(levels, torch.tensor([16, 4, 1, 1 / 8, 8], dtype=torch.float64))


def test_water_levels_spend_the_bits():
    torch.manual_seed(0)
    variances = torch.rand(3, 8, 8, dtype=torch.float64) ** 6
    bits = [0.5, 10.0, 300.0, 5000.0]
    spent = [(variances / level).log2().div(2).clamp(min=0).sum() for level in water_levels(variances, bits)]
    assert [float(x) for x in spent] == pytest.approx(bits, rel=1e-9)


def test_coefficients_that_never_vary_get_no_bits():
    one, padded = torch.tensor([9.0, 2.0]), torch.tensor([9.0, 0.0, 2.0, 0.0])
    torch.testing.assert_close(water_levels(padded, [3.0, 20.0]), water_levels(one, [3.0, 20.0]))
    with pytest.raises(ValueError, match="all variances are 0"):
        water_levels(torch.zeros(4), [1.0])


def test_the_gaussian_bound_in_closed_form():
    # Equal variances v: D = v 2^(-2 bits / n), and the squared error of [-1, 1] is 4 times that of [0, 1].
    variances = torch.full((3, 4, 4), 0.5)
    bits = [0.0, 48.0, 96.0]
    expected = [-10 * torch.tensor(0.5 * 2.0 ** (-2 * b / 48) / 4).log10() for b in bits]
    torch.testing.assert_close(gaussian_psnr(variances, bits), torch.stack(expected).double())
    # Within a cutoff of 2, four coefficients a channel share the bits, and the other twelve keep their variance.
    inside = [0.5 * (12 + 4 * 2.0 ** (-2 * b / 12)) / 16 / 4 for b in bits]
    limited = gaussian_psnr(variances, bits, cutoffs=[2, 2, 2])
    torch.testing.assert_close(limited, -10 * torch.tensor(inside, dtype=torch.float64).log10())


def test_no_code_of_gaussian_images_is_better_than_the_bound():
    """Uniform scalar quantizers at the rate of their entropy are 1.53 dB behind at high rates (Gish & Pierce)."""
    generator = torch.Generator().manual_seed(0)
    deviations = 2.0 ** -torch.arange(16.0).view(1, 4, 4).div(4)
    images = torch.randn(200_000, 1, 4, 4, generator=generator) * deviations
    step = 0.02
    indices = (images / step).round()
    bits = 0.0
    for column in indices.flatten(1).T:
        p = column.unique(return_counts=True)[1] / len(column)
        bits -= float((p * p.log2()).sum())
    psnr = -10 * float(((indices * step - images).square().mean() / 4).log10())
    assert gaussian_psnr(deviations**2, [bits]).item() - psnr == pytest.approx(1.53, abs=0.03)


def test_data_cutoffs_open_what_is_worth_a_bit():
    frequency = square_frequency(8)
    variances = 2.0 ** (-2.0 * frequency)[None]  # a step of max(u, v) takes one bit off a coefficient's worth
    count = (2 * torch.arange(8) + 1).tolist()  # coefficients of each max(u, v)

    def bits_to(level):  # all those below `level` are worth one bit a step
        return float(sum(count[f] * (level - f) for f in range(level)))

    bits = [bits_to(1) - 0.5, bits_to(1), bits_to(2) + 0.5, bits_to(4), bits_to(6) + 1]
    assert data_cutoffs(variances, bits) == (1, 1, 3, 4, 8)  # the last one opens everything
    colour = torch.cat([0.1 * variances, variances, 0 * variances])
    assert data_cutoffs(colour, bits[:1] + bits) == (1, 1, 1, 3, 4, 8)
    assert data_cutoffs(variances, [0.0, 0.0]) == (1, 8)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 4])
def test_bands_are_disjoint_and_cover_the_spectrum(alpha):
    for H, N in product((1, 8, 32, 256), (1, 5, 32, 64, 300)):
        cutoffs = cutoff_schedule(H, N, alpha)
        assert len(cutoffs) == N
        assert cutoffs[0] >= 1
        assert cutoffs[-1] == H
        assert list(cutoffs) == sorted(cutoffs)
        owners = torch.zeros(H, dtype=torch.long)  # by max(u, v): a band is all of some of its values
        for low, high in bands(cutoffs):
            owners[low:high] += 1
        assert (owners == 1).all()


def test_masks_of_the_bands_add_up():
    cutoffs = cutoff_schedule(16, 24, 1.5)
    assert len(set(cutoffs)) < 24  # with ties
    masks = square_mask(16, torch.tensor((0, *cutoffs)))  # (1 + N, H, H)
    opened = masks[1:].long() - masks[:-1].long()
    assert opened.min() == 0
    assert (opened.sum(0) == 1).all()
    assert [int(m.sum()) for m in masks[1:]] == [r * r for r in cutoffs]


@pytest.mark.parametrize(("H", "N", "alpha"), [(0, 4, 1.0), (8, 0, 1.0), (8, 4, -1.0), (-8, 4, 1.0)])
def test_impossible_schedules_are_refused(H, N, alpha):
    with pytest.raises(ValueError, match="must be"):
        cutoff_schedule(H, N, alpha)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_must_be_finite(alpha):
    with pytest.raises(ValueError, match="alpha must be 0 or a positive number"):
        cutoff_schedule(8, 4, alpha)


def test_square_frequency_and_masks():
    assert square_frequency(3).tolist() == [[0, 1, 2], [1, 1, 2], [2, 2, 2]]
    assert square_mask(3, 2).tolist() == [[True, True, False], [True, True, False], [False] * 3]
    several = square_mask(3, torch.tensor([[0, 1], [2, 3]]))
    assert several.shape == (2, 2, 3, 3)
    assert torch.equal(several[1, 0], square_mask(3, 2))


# Band limiting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cutoff", [0, 1, 2, 7, 15, 16, 20])
def test_low_pass_is_the_mask_on_the_dct(cutoff):
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = idctn(
        dctn(x.numpy(), norm="ortho", axes=(2, 3)) * square_mask(16, cutoff).numpy(), norm="ortho", axes=(2, 3)
    )
    once = low_pass(x, cutoff)
    torch.testing.assert_close(once, torch.from_numpy(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(low_pass(once, cutoff), once, rtol=0, atol=1e-12)  # idempotent
    torch.testing.assert_close(low_pass(x, torch.tensor(cutoff)), once, rtol=0, atol=1e-12)


def test_low_passes_nest():
    x = torch.randn(1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(low_pass(low_pass(x, 11), 5), low_pass(x, 5), rtol=0, atol=1e-12)
    torch.testing.assert_close(low_pass(low_pass(x, 5), 11), low_pass(x, 5), rtol=0, atol=1e-12)


def test_one_cutoff_an_image():
    x = torch.randn(2, 3, 1, 16, 16, dtype=torch.float64)  # (B, S, C, H, H)
    cutoffs = torch.tensor([[1, 4, 16], [2, 9, 3]])
    limited = low_pass(x, cutoffs)
    for b in range(2):
        for s in range(3):
            torch.testing.assert_close(limited[b, s], low_pass(x[b, s], int(cutoffs[b, s])), rtol=0, atol=1e-13)


def test_nested_targets():
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    cutoffs = cutoff_schedule(16, 6)
    for given in (cutoffs, list(cutoffs), torch.tensor(cutoffs)):
        targets = nested_targets(x, given)
        assert targets.shape == (2, 6, 3, 16, 16)
        for k, r in enumerate(cutoffs):
            torch.testing.assert_close(targets[:, k], low_pass(x, r), rtol=0, atol=1e-13)
    torch.testing.assert_close(targets[:, -1], x, rtol=0, atol=1e-12)  # x_N = x
    mean = x.mean((-2, -1), keepdim=True).expand_as(x)
    torch.testing.assert_close(nested_targets(x, [1])[:, 0], mean, rtol=0, atol=1e-12)


def test_band_passes_add_up_to_the_image():
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    parts = [band_pass(x, low, high) for low, high in bands(cutoff_schedule(16, 10))]
    torch.testing.assert_close(sum(parts), x, rtol=0, atol=1e-12)
    outside = ~(square_mask(16, 7) & ~square_mask(16, 3))
    assert dct2(band_pass(x, 3, 7))[..., outside].abs().max() < 1e-12


# Statistics -----------------------------------------------------------------------------------------------


def test_ring_energies_sum_to_the_image():
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    frequency, power = radial_power_spectrum(x)
    count = torch.bincount(radial_frequency(16).flatten())
    assert power.shape == (2, len(frequency))
    assert frequency.tolist() == list(range(round(2**0.5 * 15) + 1))
    torch.testing.assert_close((power * count).sum(-1), x.square().sum((-2, -1)).mean(-1))


@pytest.mark.parametrize(("u", "v", "ring"), [(0, 0, 0), (5, 0, 5), (0, 11, 11), (3, 4, 5), (9, 9, 13), (15, 15, 21)])
def test_a_cosine_is_one_ring(u, v, ring):
    n = torch.arange(16, dtype=torch.float64) + 0.5
    wave = torch.cos(torch.pi * u * n / 16)[:, None] * torch.cos(torch.pi * v * n / 16)
    _, power = radial_power_spectrum(wave[None])
    energy = power * torch.bincount(radial_frequency(16).flatten())
    torch.testing.assert_close(energy[ring], wave.square().sum())
    assert energy.sum() - energy[ring] < 1e-12


@pytest.mark.parametrize(("N", "alpha"), [(8, 1.0), (24, 1.5), (40, 2.0)])
def test_band_energy(N, alpha):
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    cutoffs = cutoff_schedule(16, N, alpha)
    energy = band_energy(x, cutoffs)
    torch.testing.assert_close(energy.sum(-1), x.square().sum((-3, -2, -1)))  # Parseval
    for k, (low, high) in enumerate(bands(cutoffs)):
        torch.testing.assert_close(energy[:, k], band_pass(x, low, high).square().sum((-3, -2, -1)))
        assert (energy[:, k] > 0).all() == (low < high)


def test_energy_above_the_last_cutoff_belongs_to_no_band():
    x = torch.randn(1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(band_energy(x, [4, 9]).sum(), low_pass(x, 9).square().sum())


# Bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 6), (8, 8), (8,)])
@pytest.mark.parametrize(
    "function", [lambda x: low_pass(x, 2), radial_power_spectrum, lambda x: band_energy(x, (2, 8))]
)
def test_images_must_be_square(function, shape):
    with pytest.raises(ValueError, match=r"must be square, of shape \(\.\.\., C, H, H\), got \("):
        function(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("function", [dct2, idct2, lambda x: low_pass(x, 2), radial_power_spectrum])
def test_integer_images_are_refused(function, dtype):
    with pytest.raises(TypeError, match="floating-point"):
        function(torch.zeros(1, 8, 8, dtype=dtype))
