"""Quality, contributions, influence, statistics and rate-distortion, against closed forms and other libraries."""

import math
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.functional.image import structural_similarity_index_measure

from spectralar.analysis import (
    STATISTICS_FILE,
    baselines,
    code_marginals,
    code_use,
    dct_truncation,
    energy,
    file_codec,
    influence_matrix,
    influence_steps,
    next_token_entropy,
    prefix_bits,
    psnr,
    read_statistics,
    ssim,
    token_contributions,
    write_statistics,
)
from spectralar.spectral import band_energy, dct2, radial_frequency, square_frequency
from tests.helpers import tiny_tokenizer, tiny_transformer


def photo(channels: int, size: int, seed: int = 0) -> torch.Tensor:
    """An image (C, H, H) in [-1, 1] with a spectrum that falls as natural images' do."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.randn(channels, size, size, generator=generator, dtype=torch.float64)
    n = torch.arange(size)
    frequency = torch.minimum(n, size - n)
    x = torch.fft.ifft2(torch.fft.fft2(spectrum) / (1 + frequency[:, None] + frequency)).real
    return (x / x.abs().amax()).float()


# Quality ----------------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    reference = torch.zeros(2, 3, 8, 8)
    images = reference + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    # On [0, 1] the errors are 0.1 and 0.01.
    torch.testing.assert_close(psnr(images, reference), torch.tensor([20.0, 40.0]))
    assert psnr(reference, reference).tolist() == [100.0, 100.0]


def test_psnr_clamps_and_broadcasts():
    reference = torch.full((2, 1, 1, 4, 4), 3.0)
    frames = torch.stack([torch.full((3, 1, 4, 4), 1.5), torch.full((3, 1, 4, 4), -7.0)])
    assert psnr(frames, reference).tolist() == [[100.0] * 3, [0.0] * 3]


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 33)])
def test_ssim_is_the_published_one(channels, size):
    reference = torch.stack([photo(channels, size, seed) for seed in range(3)])
    images = reference + 0.2 * torch.randn(reference.shape)
    ours = ssim(images, reference)
    a, b = ((x.clamp(-1, 1) + 1) / 2 for x in (images, reference))
    # torchmetrics also averages over the border, where it sees reflections; Wang et al. do not.
    whole = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)[1]
    theirs = whole[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ours.max() < 0.95
    torch.testing.assert_close(ssim(reference, reference), torch.ones(3))
    # Leading axes: two images at three noise levels, each as if alone.
    frames = torch.stack([images[:2], reference[:2], (images + reference)[:2] / 2], dim=1)
    expected = torch.stack([ssim(frame, reference[:2]) for frame in frames.unbind(1)], dim=1)
    torch.testing.assert_close(ssim(frames, reference[:2, None]), expected)


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 12"):
        ssim(torch.zeros(1, 12, 10), torch.zeros(1, 12, 10))


# Contributions ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def tokenizer(request):
    return tiny_tokenizer(request.param).double()


def random_codes(tokenizer, count: int = 3, seed: int = 0) -> torch.Tensor:
    shape = (count, tokenizer.config.num_tokens)
    return torch.randint(tokenizer.config.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


def all_prefixes(tokenizer, codes):
    with torch.no_grad():
        return tokenizer.decode(codes, list(range(1, codes.shape[1] + 1)))


def test_contributions_add_up_to_the_frames(tokenizer):
    frames = all_prefixes(tokenizer, random_codes(tokenizer))
    parts = token_contributions(frames, tokenizer.cutoffs)
    assert parts.frames is frames and parts.refinement.shape == parts.opening.shape == frames.shape
    torch.testing.assert_close((parts.refinement + parts.opening).cumsum(dim=1), frames, rtol=0, atol=1e-12)
    assert parts.refinement[:, 0].abs().max() < 1e-12  # there is nothing to refine before the first token
    some = token_contributions(frames[:, :5], tokenizer.cutoffs)
    torch.testing.assert_close(some.refinement, parts.refinement[:, :5], rtol=0, atol=1e-12)


def test_each_part_stays_in_its_bands(tokenizer):
    cutoffs = tokenizer.cutoffs
    assert len(set(cutoffs)) < len(cutoffs)  # ties: tokens that open nothing
    frames = all_prefixes(tokenizer, random_codes(tokenizer))
    parts = token_contributions(frames, cutoffs)
    refining, opening = (band_energy(x, cutoffs) for x in (parts.refinement, parts.opening))  # (B, N, N)
    for k in range(1, len(cutoffs)):
        assert refining[:, k, k:].max() < 1e-20
        assert torch.cat([opening[:, k, :k], opening[:, k, k + 1 :]], dim=1).max() < 1e-20
        assert refining[:, k, :k].sum() > 1e-6
        assert (opening[:, k, k].sum() > 1e-6) == (cutoffs[k] > cutoffs[k - 1])
    # The parts are in different bands, so their energies add (Parseval).
    step = torch.cat([frames[:, :1], frames[:, 1:] - frames[:, :-1]], dim=1)
    torch.testing.assert_close(energy(parts.refinement) + energy(parts.opening), energy(step))
    torch.testing.assert_close(energy(step), dct2(step).square().sum(dim=(-3, -2, -1)))


# Influence --------------------------------------------------------------------------------------------------


def test_marginals_are_frequencies():
    codes = torch.tensor([[0, 2], [0, 1], [3, 2], [0, 2]])
    expected = [[0.75, 0, 0, 0.25, 0], [0, 0.25, 0.75, 0, 0]]
    assert code_marginals(codes, 5).tolist() == expected


def test_influence_is_zero_where_the_code_is_certain(tokenizer):
    codes = random_codes(tokenizer, 1).expand(2, -1)
    marginals = code_marginals(codes, tokenizer.config.codebook_size)
    marginals[4] = 1 / marginals.shape[1]
    matrix = influence_matrix(tokenizer, codes, marginals)
    certain = torch.arange(len(matrix)) != 4
    assert matrix[certain].max() < 1e-20
    assert matrix[4].sum() > 1e-6


def test_influence_by_hand(tokenizer):
    """With one other code that is certain to be drawn, a row is the spectrum of the exact difference."""
    codes, others = random_codes(tokenizer, 2), random_codes(tokenizer, 1, seed=1)
    matrix = influence_matrix(tokenizer, codes, code_marginals(others, tokenizer.config.codebook_size), draws=3)
    size = tokenizer.config.image_size
    assert matrix.shape == (tokenizer.config.num_tokens, round(math.sqrt(2) * (size - 1)) + 1)
    k = 7
    changed = codes.clone()
    changed[:, k - 1] = others[:, k - 1]
    with torch.no_grad():
        difference = tokenizer.decode(changed, k) - tokenizer.decode(codes, k)
    power = dct2(difference).square().sum(dim=1).mean(dim=0)  # (H, H)
    for f in (0, 1, 3, 5):
        expected = power[radial_frequency(size) == f].sum()
        torch.testing.assert_close(matrix[k - 1, f].double(), expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(matrix[k - 1].sum().double(), energy(difference).mean(), rtol=1e-4, atol=0)


def test_influence_stays_below_the_cutoff_and_follows_its_seed(tokenizer):
    codes = random_codes(tokenizer, 2)
    marginals = torch.ones(codes.shape[1], tokenizer.config.codebook_size)  # weights need not be normalised
    matrix = influence_matrix(tokenizer, codes, marginals, draws=2, seed=1)
    assert matrix.min() >= 0 and matrix.isfinite().all()
    for row, r in zip(matrix, tokenizer.cutoffs, strict=True):
        # Inside the square of r the largest radial frequency is that of its corner, sqrt(2) (r - 1).
        corner = round(math.sqrt(2) * (r - 1))
        assert row[corner + 1 :].sum() < 1e-10 < row[: corner + 1].sum()
    assert torch.equal(matrix, influence_matrix(tokenizer, codes, marginals, draws=2, seed=1))
    assert not torch.equal(matrix, influence_matrix(tokenizer, codes, marginals, draws=2, seed=2))


def test_influence_comes_one_token_at_a_time(tokenizer):
    codes = random_codes(tokenizer, 1)
    marginals = torch.ones(codes.shape[1], tokenizer.config.codebook_size)
    steps = influence_steps(tokenizer, codes, marginals)
    first = next(steps)
    steps.close()
    assert torch.equal(first, influence_matrix(tokenizer, codes[:, :1], marginals[:1])[0])


@pytest.mark.parametrize("marginals", [torch.ones(11, 32), torch.ones(12, 31), torch.zeros(12, 32)])
def test_unfit_marginals_are_refused_at_once(marginals):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"weights of shape \(12, 32\)"):
        influence_steps(tokenizer, random_codes(tokenizer), marginals)


# Codes of a model -------------------------------------------------------------------------------------------


def test_next_token_entropy_of_certain_and_open_models():
    model = tiny_transformer().double()
    codes = torch.randint(32, (5, 12))
    labels = torch.tensor([0, 1, 2, 3, 0])
    entropy = next_token_entropy(model, codes, labels)
    logits = model(codes[:, :-1], labels)
    expected = torch.distributions.Categorical(logits=logits).entropy().mean(dim=0)
    torch.testing.assert_close(entropy, expected.float())
    torch.testing.assert_close(next_token_entropy(model, codes, labels, batch_size=2), entropy)
    assert entropy.min() > 0.1 and entropy.max() < math.log(32) - 0.1
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    torch.testing.assert_close(next_token_entropy(model, codes, labels), torch.full((12,), math.log(32)))
    nested = next_token_entropy(model, codes, labels, codebook_sizes=[1, 2] + [32] * 10)
    torch.testing.assert_close(nested[:3], torch.tensor([0, math.log(2), math.log(32)]))


def test_code_use():
    use = code_use(torch.tensor([[4, 0, 0, 0], [2, 2, 2, 2], [1, 3, 0, 0]]))
    assert use.used.tolist() == [1, 4, 2]
    expected = [1.0, 4.0, math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))]
    torch.testing.assert_close(use.perplexity, torch.tensor(expected, dtype=torch.float64))


def test_statistics_round_trip(tmp_path):
    assert read_statistics(tmp_path) is None
    codes = torch.randint(9, (50, 4))
    entropy = torch.rand(4)
    path = write_statistics(tmp_path, codes, 9, entropy)
    assert path == tmp_path / STATISTICS_FILE
    statistics = read_statistics(tmp_path)
    assert statistics.code_counts.dtype == torch.int32
    torch.testing.assert_close(statistics.code_counts / 50.0, code_marginals(codes, 9).float())
    assert torch.equal(statistics.next_token_entropy, entropy)


def test_unfit_statistics(tmp_path):
    with pytest.raises(ValueError, match="between 0 and 8"):
        write_statistics(tmp_path, torch.tensor([[9]]), 9, torch.zeros(1))
    with pytest.raises(ValueError, match=r"got \(5, 4\) and \(3,\)"):
        write_statistics(tmp_path, torch.zeros(5, 4, dtype=torch.long), 9, torch.zeros(3))
    path = tmp_path / STATISTICS_FILE
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="holds no statistics"):
        read_statistics(tmp_path)
    save_file({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no statistics"):
        read_statistics(tmp_path)
    save_file({"code_counts": torch.zeros(4, 9), "next_token_entropy": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"must hold code_counts \(N, K\)"):
        read_statistics(tmp_path)


# Rate-distortion --------------------------------------------------------------------------------------------


def test_bits_of_prefixes():
    assert prefix_bits(4, 1024) == [10, 20, 30, 40]


@pytest.mark.parametrize("channels", [1, 3])
def test_dct_truncation_keeps_to_its_budget(channels):
    size = 32
    image = photo(channels, size)
    frequency = square_frequency(size)
    bound = size / (1.0 + frequency)
    last = 0.0
    for bits in (2 * channels, 40, 200, 352, 2000, 30000):
        coded = dct_truncation(image, bits)
        coefficients = dct2(coded)
        side = max([0, *(frequency[(coefficients.abs() > 1e-4).any(dim=0)] + 1).tolist()])
        # Levels of some depth that fits the budget: whole steps within the range, as many as the depth has.
        depths = [d for d in range(2, 9) if channels * side**2 * d <= bits]
        levels = [coefficients / (2 * bound / 2**d) for d in depths]
        assert any(
            (x - x.round()).abs().max() < 1e-2 and x.min() > -(2 ** (d - 1)) - 0.1 and x.max() < 2 ** (d - 1) - 0.9
            for d, x in zip(depths, levels, strict=True)
        )
        quality = float(psnr(coded, image))
        assert quality >= last
        last = quality
    assert last > 35
    assert dct_truncation(image, 2 * channels - 1) is None


def test_dct_truncation_spends_its_bits_on_levels():
    """In a budget of 3 bits one coefficient of 3 bits is all there is: the mean in steps of H / 4."""
    image = torch.full((1, 8, 8), 0.24)  # mean coefficient 8 * 0.24 = 1.92, one step of 2
    torch.testing.assert_close(dct_truncation(image, 3), torch.full((1, 8, 8), 0.25))
    torch.testing.assert_close(dct_truncation(image, 2), torch.zeros(1, 8, 8))  # steps of 4: nearer to none


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_a_file_is_the_best_that_fits(file_format, channels):
    image = photo(channels, 32)
    pixels = ((image + 1) * 127.5).round().byte()
    picture = Image.fromarray(pixels[0].numpy() if channels == 1 else pixels.movedim(0, -1).numpy())
    options = {"optimize": True} if file_format == "JPEG" else {"method": 4}
    files = []  # of every quality: bits, picture, PSNR
    for quality in range(96):
        buffer = BytesIO()
        picture.save(buffer, file_format, quality=quality, **options)
        decoded = np.array(Image.open(buffer).convert(picture.mode), dtype=np.float32) / 127.5 - 1
        decoded = torch.from_numpy(decoded).view(32, 32, channels).movedim(-1, 0)
        files.append((8 * len(buffer.getvalue()), decoded, float(psnr(decoded, image))))
    smallest = files[0][0]
    budgets = [64, smallest - 1, smallest, files[30][0], files[70][0] + 5, 10**6]
    coded = file_codec(image, budgets, file_format)
    assert coded[:2] == [None, None]
    for bits, x in zip(budgets[2:], coded[2:], strict=True):
        fitting = [(decoded, quality) for size, decoded, quality in files if size <= bits]
        assert any(torch.equal(x, decoded) for decoded, _ in fitting)
        # Sizes do not quite grow with quality, so that the search may miss the best by a little.
        assert float(psnr(x, image)) >= max(quality for _, quality in fitting) - 0.5


def test_baselines():
    image = photo(3, 32)
    bits = prefix_bits(4, 2048)
    coded = baselines(image.double(), bits)
    assert list(coded) == ["DCT truncation", "JPEG", "WebP"]
    assert all(len(images) == 4 for images in coded.values())
    assert coded["JPEG"] == [None] * 4  # headers alone take more
    assert all(x is not None for x in coded["DCT truncation"])
