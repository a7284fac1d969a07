"""Band limits and the equality of all ways to decode, on tiny random tokenizers."""

import pytest
import torch

from spectralar import SpectralTokenizer
from spectralar.inference.frames import PrefixDecoder
from spectralar.spectral import dct2, square_mask
from spectralar.tokenizer import ROWS_AT_ONCE
from tests.helpers import tiny_tokenizer
from tests.test_tokenizer import ALL_KINDS, EXACT, GRID, K, N, images_for, random_codes


@pytest.fixture(params=ALL_KINDS)
def tokenizer(request) -> SpectralTokenizer:
    channels, config = ALL_KINDS[request.param]
    return tiny_tokenizer(channels, **config).double()


def test_without_cutoffs_a_prefix_holds_all_frequencies():
    tokenizer = tiny_tokenizer(alpha=0.0)
    images = tokenizer.decode(torch.randint(0, K, (2, 1)))
    spectrum = dct2(images.double()).abs()
    assert (spectrum[..., 8:, 8:].amax(dim=(-3, -2, -1)) > 1e-3).all()


@pytest.mark.parametrize("alpha", [0.5, 1.5])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_prefix_holds_no_frequency_above_its_cutoff(channels, alpha):
    tokenizer = tiny_tokenizer(channels, alpha=alpha)
    frames = tokenizer.decode(random_codes(4), list(range(1, N + 1)))  # (B, N, C, H, H) float32
    energy = dct2(frames.double()).square().sum(dim=2)  # (B, N, H, H)
    outside = ~square_mask(16, torch.tensor(tokenizer.cutoffs))
    assert ((energy * outside).sum((2, 3)) < 1e-6 * energy.sum((2, 3))).all()
    # It is the cutoff that limits them: the band below it is not empty.
    for k, r in enumerate(tokenizer.cutoffs):
        edge = square_mask(16, r) & ~square_mask(16, r - 1)
        assert ((energy[:, k] * edge).sum((1, 2)) > 1e-6 * energy[:, k].sum((1, 2))).all()


def test_all_ways_to_decode_agree(tokenizer):
    codes = random_codes()
    separate = [tokenizer.decode(codes[:, :k]) for k in range(1, N + 1)]  # later codes are not even there
    assert separate[0].shape == images_for(tokenizer).shape
    together = tokenizer.decode(codes, list(range(1, N + 1)))
    assert together.shape == (3, N, *separate[0].shape[1:])
    incremental, chunked = PrefixDecoder(tokenizer, 3), PrefixDecoder(tokenizer, 3)
    for k in range(1, N + 1):
        torch.testing.assert_close(together[:, k - 1], separate[k - 1], **EXACT)
        torch.testing.assert_close(tokenizer.decode(codes, k), separate[k - 1], **EXACT)
        incremental.append(codes[:, k - 1 : k])
        torch.testing.assert_close(incremental.frame(), separate[k - 1], **EXACT)
    for start, end in ((0, 3), (3, 4), (4, 9), (9, N)):
        chunked.append(codes[:, start:end])
        assert chunked.length == end
        torch.testing.assert_close(chunked.frame(), separate[end - 1], **EXACT)
    # None of this says anything unless every token changes the image.
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(separate, separate[1:], strict=False))


def test_a_frame_may_be_asked_for_twice_or_not_at_all(tokenizer):
    codes = random_codes()
    decoder = PrefixDecoder(tokenizer, 3)
    for k in range(1, N + 1):
        decoder.append(codes[:, k - 1 : k])
        if k in (4, 5, N):
            for _ in range(2):
                torch.testing.assert_close(decoder.frame(), tokenizer.decode(codes, k), **EXACT)


@pytest.mark.parametrize("config", [{}, {"alpha": 0.0}, GRID], ids=["codebook", "no cutoffs", "grid"])
def test_all_ways_to_decode_agree_in_float32(config):
    tokenizer, codes = tiny_tokenizer(3, **config), random_codes()
    together, decoder = tokenizer.decode(codes, list(range(1, N + 1))), PrefixDecoder(tokenizer, 3)
    for k in range(1, N + 1):
        decoder.append(codes[:, k - 1 : k])
        for image in (decoder.frame(), together[:, k - 1]):
            torch.testing.assert_close(image, tokenizer.decode(codes[:, :k]), rtol=0, atol=1e-5)


def test_one_prefix_length_an_image(tokenizer):
    codes, lengths = random_codes(4), [5, 1, N, 5]
    images = tokenizer.decode(codes, torch.tensor(lengths))
    assert images.shape == images_for(tokenizer, 4).shape
    for i, k in enumerate(lengths):
        torch.testing.assert_close(images[i], tokenizer.decode(codes[i : i + 1], k)[0], **EXACT)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16, torch.uint64])
def test_lengths_of_any_integer_type(dtype):
    tokenizer, codes = tiny_tokenizer(), random_codes()
    lengths = torch.tensor([1, 5, N])
    assert torch.equal(tokenizer.decode(codes, lengths.to(dtype)), tokenizer.decode(codes, lengths))


def test_codes_made_in_inference_mode_are_taken_outside():
    with torch.inference_mode():
        codes = random_codes()
    images = tiny_tokenizer().decode(codes)
    assert images.requires_grad and torch.equal(images, tiny_tokenizer().decode(codes.clone()))


@pytest.mark.parametrize("rows", [1, 100, 10**6], ids=["one at a time", "two", "all"])
def test_lengths_in_any_order_and_more_than_once(tokenizer, monkeypatch, rows):
    monkeypatch.setitem(ROWS_AT_ONCE, "cpu", rows)  # 3 images of 16 mask tokens: 48 for each length
    codes = random_codes()
    frames = tokenizer.decode(codes, [7, 2, 2])
    for i, k in enumerate((7, 2, 2)):
        torch.testing.assert_close(frames[:, i], tokenizer.decode(codes, k), **EXACT)


def test_decoding_does_not_depend_on_later_codes(tokenizer):
    codes, others = random_codes(), random_codes()
    others[:, :5] = codes[:, :5]
    frames, changed = tokenizer.decode(codes, [5, N]), tokenizer.decode(others, [5, N])
    torch.testing.assert_close(frames[:, 0], changed[:, 0], **EXACT)
    assert (frames[:, 1] - changed[:, 1]).abs().max() > 1e-3


def test_every_code_changes_the_full_image(tokenizer):
    codes = random_codes(1)
    full = tokenizer.decode(codes)
    for k in range(N):
        changed = codes.clone()
        changed[0, k] = (changed[0, k] + 1) % K
        assert (tokenizer.decode(changed) - full).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_codes_of_any_integer_type(dtype):
    tokenizer, codes = tiny_tokenizer(), random_codes()
    assert torch.equal(tokenizer.decode(codes.to(dtype), 4), tokenizer.decode(codes, 4))


def test_an_empty_batch(tokenizer):
    codes = tokenizer.encode(images_for(tokenizer, 0))
    assert codes.shape == (0, N)
    assert tokenizer.decode(codes).shape == images_for(tokenizer, 0).shape


# Bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, N + 1, 2.5])
def test_prefix_lengths_out_of_range(k):
    tokenizer, message = tiny_tokenizer(), f"num_tokens must be an integer between 1 and {N}, got {k}"
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(torch.zeros(1, 1, 16, 16), num_tokens=k)
    for lengths in ([k], [1, k], torch.tensor([k, 1])):
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(random_codes(2), lengths)
    if isinstance(k, int):
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(random_codes(2), k)


def test_a_prefix_longer_than_the_codes():
    with pytest.raises(ValueError, match="between 1 and 4, got 5"):
        tiny_tokenizer().decode(random_codes(length=4), 5)


@pytest.mark.parametrize("lengths", [[], 2.0, (k for k in (1, 2))])
def test_prefix_lengths_of_an_unfit_type(lengths):
    with pytest.raises(ValueError, match="num_tokens must be an integer"):
        tiny_tokenizer().decode(random_codes(), lengths)


def test_a_tensor_of_lengths_needs_one_an_image():
    with pytest.raises(ValueError, match=r"num_tokens as a tensor must have shape \(3,\), one length an image"):
        tiny_tokenizer().decode(random_codes(3), torch.tensor([1, 2]))


@pytest.mark.parametrize("codes", [torch.tensor([[0, K]]), torch.tensor([[-1, 0]])])
def test_codes_out_of_range(codes):
    with pytest.raises(ValueError, match=f"codes must be integers between 0 and {K - 1}, got {int(codes.min())} to"):
        tiny_tokenizer().decode(codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool])
def test_codes_that_are_not_integers(dtype):
    with pytest.raises(ValueError, match=f"codes must be integers between 0 and {K - 1}, got a tensor of {dtype}"):
        tiny_tokenizer().decode(torch.zeros(1, 3, dtype=dtype))


@pytest.mark.parametrize("shape", [(3,), (1, 0), (1, N + 1), (1, 1, 3)])
def test_codes_of_another_shape(shape):
    with pytest.raises(ValueError, match=rf"codes must have shape \(B, n\) with n in 1..{N}, got \("):
        tiny_tokenizer().decode(torch.zeros(shape, dtype=torch.long))


def test_unfit_use_of_the_prefix_decoder():
    decoder = PrefixDecoder(tiny_tokenizer(), 2)
    with pytest.raises(ValueError, match="append at least one code"):
        decoder.frame()
    decoder.append(random_codes(2, N - 1))
    for codes in (random_codes(2, 2), random_codes(3, 1), random_codes(2, 0), torch.zeros(2, dtype=torch.long)):
        with pytest.raises(ValueError, match=rf"codes must have shape \(2, T\), .* no more than {N} with the {N - 1}"):
            decoder.append(codes)
