"""Prefix causality, band limits and the equality of all ways to decode, on tiny random tokenizers."""

import json

import pytest
import torch
import torch.nn.functional as F

from spectralar import SpectralTokenizer
from spectralar.quantizer import CodebookRevival, VectorQuantizer, nested_codebook_sizes
from spectralar.spectral import cutoff_schedule, dct2, low_pass, square_mask
from spectralar.tokenizer import encoder_mask
from tests.helpers import tiny_tokenizer

N, K = 12, 32  # of `tiny_tokenizer`
GRID = {"fsq_levels": [4, 3, 5], "codebook_size": 60, "codebook_dim": 3}
EXACT = {"rtol": 0, "atol": 1e-11}  # float64: only the order of sums may differ


SHORTCUT = {"spectral_shortcut": True, "alpha": 0.5}


KINDS = {"grey": (1, {}), "colour": (3, {}), "shortcut": (1, SHORTCUT)}
ALL_KINDS = {**KINDS, "shortcut-alone": (3, {**SHORTCUT, "encoder_layers": 0})}


@pytest.fixture(params=ALL_KINDS)
def tokenizer(request) -> SpectralTokenizer:
    channels, config = ALL_KINDS[request.param]
    return tiny_tokenizer(channels, **config).double()


@pytest.fixture(params=KINDS)
def learned(request) -> SpectralTokenizer:
    """A tokenizer whose encoder has a network."""
    channels, config = KINDS[request.param]
    return tiny_tokenizer(channels, **config).double()


def images_for(tokenizer: SpectralTokenizer, batch: int = 3) -> torch.Tensor:
    """Random images in [-1, 1], of the model's own type."""
    side = tokenizer.config.image_size
    return (2 * torch.rand(batch, tokenizer.config.in_channels, side, side) - 1).to(tokenizer.dtype)


def random_codes(batch: int = 3, length: int = N) -> torch.Tensor:
    return torch.randint(K, (batch, length))


# Encoding ------------------------------------------------------------------------------------------------


def test_images_that_are_not_finite_are_told():
    x = torch.rand(2, 1, 16, 16)
    for value in (torch.nan, torch.inf):
        x[1, 0, 3, 4] = value
        with pytest.raises(ValueError, match="images must be finite"):
            tiny_tokenizer().encode(x)
    tokenizer = tiny_tokenizer()
    tokenizer.quantizer.codebook.data[5, 1] = torch.nan  # every latent would be nearest to it
    with pytest.raises(ValueError, match="the encoder's weights too"):
        tokenizer.encode(torch.rand(2, 1, 16, 16))


def test_the_encoder_mask_is_the_table():
    mask = encoder_mask(4, 3, torch.device("cpu"))
    for row in range(7):
        for column in range(7):
            patch = column < 4
            assert mask[row, column] == (patch if row < 4 else patch or column <= row)


def test_codes(tokenizer):
    codes = tokenizer.encode(images_for(tokenizer, 32))
    assert codes.shape == (32, N)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < K
    assert codes.unique().numel() > K / 4  # the tests below would see nothing if all codes were alike


@pytest.mark.parametrize("k", [1, 5, N - 1])
def test_codes_do_not_depend_on_later_queries(learned, k):
    images = images_for(learned, 8)
    latents, codes = learned.latents(images), learned.encode(images)
    torch.testing.assert_close(learned.latents(images, k), latents[:, :k], **EXACT)  # dropped
    assert torch.equal(learned.encode(images, num_tokens=k), codes[:, :k])
    with torch.no_grad():
        learned.queries[k:] += torch.randn_like(learned.queries[k:])  # others
    changed = learned.latents(images)
    torch.testing.assert_close(changed[:, :k], latents[:, :k], **EXACT)
    assert torch.equal(learned.encode(images)[:, :k], codes[:, :k])
    assert ((changed[:, k:] - latents[:, k:]).abs().amax(dim=(0, 2)) > 1e-3).all()


def test_a_code_does_depend_on_earlier_queries(learned):
    images = images_for(learned)
    latents = learned.latents(images)
    with torch.no_grad():
        learned.queries[0] += torch.randn_like(learned.queries[0])
    assert ((learned.latents(images) - latents).abs().amax(dim=(0, 2)) > 1e-6).all()


def test_patches_never_see_queries(learned):
    images, seen = images_for(learned), []
    patches = learned.num_patches
    for block in learned.encoder:
        block.register_forward_hook(lambda _, inputs, output: seen.append(output[:, :patches]))
    learned.latents(images)
    with torch.no_grad():
        learned.queries.normal_()
    learned.latents(images)
    learned.latents(images, 1)
    first, other, few = (torch.stack(seen[i : i + 2]) for i in (0, 2, 4))
    torch.testing.assert_close(first, other, **EXACT)
    torch.testing.assert_close(first, few, **EXACT)


def test_encoding_does_not_depend_on_batch_mates(tokenizer):
    images = images_for(tokenizer, 5)
    latents = tokenizer.latents(images)
    for i in range(5):
        torch.testing.assert_close(tokenizer.latents(images[i : i + 1])[0], latents[i], **EXACT)


def test_patches_keep_their_pixels_and_places():
    tokenizer = tiny_tokenizer(3).double()
    images = torch.arange(2 * 3 * 16 * 16, dtype=torch.float64).view(2, 3, 16, 16)
    seen = []
    tokenizer.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokenizer.latents(images)
    for number in range(16):
        row, column = 4 * (number // 4), 4 * (number % 4)
        expected = images[:, :, row : row + 4, column : column + 4].flatten(1)
        assert torch.equal(seen[0][:, number], expected)


def test_nested_codebooks_are_kept_by_the_tokenizer():
    sizes = [1, 2, 4, 8] + [K] * (N - 4)
    tokenizer = tiny_tokenizer(codebook_sizes=sizes)
    codes = tokenizer.encode(images_for(tokenizer, 64))
    assert (codes.max(dim=0).values < torch.tensor(sizes)).all()


# Cutoffs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, []])
def test_without_a_list_of_cutoffs_alpha_sets_them(given):
    tokenizer = tiny_tokenizer(alpha=1.25, cutoffs=given)
    assert tokenizer.cutoffs == cutoff_schedule(16, N, 1.25)
    assert tokenizer.config.cutoffs is None


def test_a_list_of_cutoffs_takes_the_place_of_alpha(tmp_path):
    cutoffs = [3, 3, 4, 6, 6, 7, 8, 8, 9, 10, 12, 16]
    tokenizer = tiny_tokenizer(cutoffs=cutoffs).double()
    frames = tokenizer.decode(random_codes(2), list(range(1, N + 1)))  # (2, N, 1, 16, 16)
    for k, r in enumerate(cutoffs, start=1):
        spectrum = dct2(frames[:, k - 1]).abs()
        assert spectrum[..., ~square_mask(16, r)].sum() < 1e-9
        assert spectrum[..., r - 1, :r].amax() > 1e-3  # and the band is used up to its edge
    tokenizer.save_pretrained(tmp_path)
    loaded = SpectralTokenizer.from_pretrained(tmp_path)
    assert loaded.cutoffs == tuple(cutoffs) and loaded.config.cutoffs == cutoffs


def test_a_tokenizer_saved_before_there_were_lists_of_cutoffs_loads_unchanged(tmp_path):
    tokenizer = tiny_tokenizer(alpha=1.25)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["cutoffs"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = SpectralTokenizer.from_pretrained(tmp_path)
    assert loaded.cutoffs == tokenizer.cutoffs
    codes = random_codes(2)
    assert torch.equal(loaded.decode(codes, 3), tokenizer.decode(codes, 3))


def test_prefix_bits():
    assert tiny_tokenizer().prefix_bits == [5.0 * k for k in range(1, N + 1)]
    nested = tiny_tokenizer(codebook_sizes=[2, 4, *[32] * (N - 2)])
    assert nested.prefix_bits[:4] == [1.0, 3.0, 8.0, 13.0]


# Training ------------------------------------------------------------------------------------------------


def smooth_images(channels: int) -> torch.Tensor:
    """(8, C, 16, 16) random images below frequency 4."""
    images = low_pass(torch.randn(8, channels, 16, 16), 4)
    return images / images.abs().amax(dim=(1, 2, 3), keepdim=True)


def train(tokenizer: SpectralTokenizer, images: torch.Tensor, steps: int) -> tuple[set[str], set[int]]:
    """Learns the images at full prefix; the parameters that had a gradient at some step, and the codes used."""
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    learned = isinstance(tokenizer.quantizer, VectorQuantizer)
    revival = CodebookRevival(tokenizer.quantizer, patience=5) if learned else None
    reached, used = set(), set()
    for step in range(steps):
        frames, quantized, latents = tokenizer(images, torch.tensor([tokenizer.config.num_tokens]))
        loss = F.mse_loss(frames[:, 0], images)
        loss = loss + 0.1 * (quantized.codebook_loss + 0.25 * quantized.commitment_loss)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        if revival is not None:
            revival.update(quantized.codes, latents.detach(), step, step < 0.8 * steps)
        reached |= {name for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.any()}
        used |= set(quantized.codes.flatten().tolist())
    return reached, used


@pytest.mark.parametrize("channels, rotation_trick, quantizer", [
    (1, False, {}), (3, False, {}), (1, True, {}), (1, False, {"codebook_sizes": [4]}),
    (1, False, {"fsq_levels": [4, 4, 3], "codebook_size": 48, "codebook_dim": 3}),
])  # fmt: skip
def test_eight_images_can_be_learned(channels, rotation_trick, quantizer):
    shape = {
        "image_size": 16, "in_channels": channels, "num_tokens": 8, "alpha": 0.5, "codebook_size": 32,
        "codebook_dim": 8, "hidden_size": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1,
    }  # fmt: skip
    tokenizer = SpectralTokenizer(**{**shape, "mlp_ratio": 2.0, **quantizer})
    tokenizer.quantizer.rotation_trick = rotation_trick
    images = smooth_images(channels)
    train(tokenizer, images, 200 if "fsq_levels" in quantizer else 130)
    error = F.mse_loss(tokenizer.decode(tokenizer.encode(images)), images)
    # One picture for all of them, the best that codes which say nothing allow, leaves the variance.
    assert error < 0.4 * (images - images.mean(dim=0)).square().mean()


def test_gradients_reach_every_parameter(learned):
    learned = SpectralTokenizer.from_config(learned.config)  # as training starts: the seam filter ends in zeros
    queries, codebook = learned.queries.detach().clone(), learned.quantizer.codebook.detach().clone()
    reached, used = train(learned, smooth_images(learned.config.in_channels), 3)
    assert reached == {name for name, _ in learned.named_parameters()}
    assert ((learned.queries - queries).abs().amax(dim=1) > 0).all()
    moved = (learned.quantizer.codebook - codebook).abs().amax(dim=1) > 0
    assert set(moved.nonzero().flatten().tolist()) == used


def test_the_training_pass_is_encode_then_decode(tokenizer):
    images, lengths = images_for(tokenizer), torch.tensor([[N, 3], [N, 7], [N, 1]])
    frames, quantized, latents = tokenizer(images, lengths)
    assert torch.equal(quantized.codes, tokenizer.encode(images))
    torch.testing.assert_close(latents, tokenizer.latents(images))
    for s in range(2):
        torch.testing.assert_close(frames[:, s], tokenizer.decode(quantized.codes, lengths[:, s]), **EXACT)


def test_without_quantization_the_decoder_sees_unit_latents(tokenizer):
    images, lengths = images_for(tokenizer), torch.tensor([N, 3])
    frames, quantized, latents = tokenizer(images, lengths, quantize=False)
    assert torch.equal(quantized.codes, tokenizer.encode(images))
    expected = tokenizer.decode_latents(latents / latents.norm(dim=-1, keepdim=True), lengths)
    torch.testing.assert_close(frames, expected, **EXACT)


def test_gradients_of_the_decoder():
    tokenizer = tiny_tokenizer(num_tokens=4, image_size=8).double()
    latents = F.normalize(torch.randn(2, 4, 8, dtype=torch.float64), dim=-1).requires_grad_()
    lengths = torch.tensor([[4, 2], [1, 3]])
    assert torch.autograd.gradcheck(lambda x: tokenizer.decode_latents(x, lengths), latents, fast_mode=True)


def test_autocast_trains():
    tokenizer = tiny_tokenizer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frames, quantized, _ = tokenizer(images_for(tokenizer), torch.tensor([N, 3]))
    (frames.float().square().mean() + quantized.codebook_loss).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in tokenizer.parameters())


# Saving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saving_and_loading_is_exact(tmp_path, dtype):
    sizes = [K // 2] * N
    tokenizer = tiny_tokenizer(3, codebook_sizes=sizes, alpha=2.0).to(dtype)
    tokenizer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = SpectralTokenizer.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert loaded.cutoffs == tokenizer.cutoffs
    assert list(loaded.config.codebook_sizes) == sizes
    for (name, ours), (other, theirs) in zip(tokenizer.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    images = images_for(tokenizer)
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    codes = random_codes()
    assert torch.equal(loaded.decode(codes, [3, N]), tokenizer.decode(codes, [3, N]))
    as_float32 = SpectralTokenizer.from_pretrained(tmp_path)
    assert all(torch.equal(a, b.float()) for a, b in zip(as_float32.parameters(), tokenizer.parameters(), strict=True))


def test_a_grid_is_saved_and_loaded_as_its_levels(tmp_path):
    tokenizer = tiny_tokenizer(**GRID).half()
    tokenizer.save_pretrained(tmp_path)
    for loaded in (SpectralTokenizer.from_pretrained(tmp_path),
                   SpectralTokenizer.from_pretrained(tmp_path, low_cpu_mem_usage=False)):  # fmt: skip
        assert list(loaded.config.fsq_levels) == [4, 3, 5]
        assert not [name for name in loaded.state_dict() if name.startswith("quantizer")]
        images = images_for(loaded)
        codes = loaded.encode(images)
        assert torch.equal(codes, tiny_tokenizer(**GRID).half().float().encode(images))
        assert 1 < codes.unique().numel() and codes.max() < 60
        assert torch.equal(loaded.quantizer.lookup(codes), loaded.quantizer(loaded.latents(images)).quantized)


def test_the_first_nested_size_stands_for_all(tmp_path):
    tokenizer = tiny_tokenizer(codebook_sizes=[2])
    assert list(tokenizer.config.codebook_sizes) == nested_codebook_sizes(2, K, N)
    tokenizer.save_pretrained(tmp_path)
    loaded = SpectralTokenizer.from_pretrained(tmp_path)
    assert loaded.quantizer.codebook_sizes == tokenizer.quantizer.codebook_sizes
    assert (loaded.encode(images_for(loaded, 20)) < torch.tensor(loaded.quantizer.codebook_sizes)).all()


# Bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 16, 12), (1, 3, 16, 16), (1, 1, 32, 32), (1, 16, 16), (16, 16)])
def test_images_of_another_size(shape):
    with pytest.raises(ValueError, match=r"images must have shape \(B, 1, 16, 16\), got \("):
        tiny_tokenizer().encode(torch.zeros(shape))


def test_images_that_are_not_floats():
    with pytest.raises(ValueError, match=r"images must be floating-point, in \[-1, 1\], got torch.uint8"):
        tiny_tokenizer().encode(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_size": 18}, "image_size 18 must be a multiple of patch_size 4"),
        ({"codebook_sizes": [4, 8]}, f"codebook_sizes needs one size for each of the {N} tokens, or the first alone"),
        ({"codebook_sizes": [K + 1]}, "codebook_sizes must lie between 1 and codebook_size"),
        ({"fsq_levels": [4, 3, 5]}, r"fsq_levels \[4, 3, 5\] need codebook_size 60 and codebook_dim 3"),
        ({**GRID, "codebook_sizes": [2]}, "set one"),
        ({"codebook_sizes": [K + 1] * N}, "codebook_sizes must lie between 1 and codebook_size"),
        ({"num_heads": 5}, "hidden_size 32 must be a multiple of num_heads 5"),
        ({"alpha": -1.0}, "alpha must be 0 or a positive number"),
        ({"cutoffs": [4, 16]}, f"cutoffs needs one number for each of the {N} tokens, got 2"),
        ({"cutoffs": [4] * N}, "the last one 16"),
    ],
)
def test_impossible_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_tokenizer(**config)
