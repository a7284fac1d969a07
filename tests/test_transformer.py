"""The autoregressive transformer: cache, causality, the paper's size, initial loss, and learning."""

import math

import pytest
import torch
import torch.nn.functional as F

from spectralar import layers
from spectralar.sampling import draw_uniforms, guide, sample_tokens
from spectralar.transformer import PRESETS, SpectralARTransformer

K, N, CLASSES = 23, 9, 8
KINDS = [{}, {"shared_adaln": True}, {"codebook_dim": 4}]
TINY = dict(num_classes=CLASSES, codebook_size=K, num_tokens=N, hidden_size=32, num_layers=2, num_heads=2)


def tiny_model(seed=0, **changes):
    """A tiny model in float64 whose every weight is random: at its own start, blocks and head do nothing."""
    model = SpectralARTransformer(**{**TINY, **changes}).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    if model.entry_maps is not None:
        model.entry_maps.adopt(torch.randn(K, 4, generator=generator, dtype=torch.float64), None)
    return model


def parameter_count(**config):
    with torch.device("meta"):
        return sum(p.numel() for p in SpectralARTransformer(**config).parameters())


@torch.no_grad()
def sample(model, labels, guidance_scale=1.0, temperature=1.0, generator=None, prefix=None):
    """The token loop in its plainest form: conditional rows first, then the unconditional ones."""
    batch, guided = labels.shape[0], guidance_scale != 1
    rows = torch.cat([labels, torch.full_like(labels, model.null_label)]) if guided else labels
    conditioning, cache = model.condition(rows), model.make_cache(rows.shape[0])
    uniforms = draw_uniforms(batch, N, generator)
    codes = torch.empty(batch, 0, dtype=torch.long) if prefix is None else prefix
    new, position = codes, 0
    for index in range(codes.shape[1], N):
        logits = model.step(new.repeat(2, 1) if guided else new, position, conditioning, cache)
        if guided:
            logits = guide(*logits.chunk(2), guidance_scale)
        new = sample_tokens(logits, uniforms[:, index], temperature)[:, None]
        codes, position = torch.cat([codes, new], dim=1), index + 1
    return codes


# ---------------------------------------------------------------------------------------------------- cache, causality


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", range(N))
def test_cached_logits_equal_uncached_ones(prefix, kind):
    """At every position, after a prefill of the start position and any number of prefix tokens."""
    model = tiny_model(**kind)
    codes, labels = torch.randint(K, (3, N - 1)), torch.tensor([0, 5, model.null_label])
    with torch.no_grad():
        expected = model(codes, labels)  # (B, N, K)
        conditioning, cache = model.condition(labels), model.make_cache(3)
        steps = [model.step(codes[:, :prefix] if prefix else None, 0, conditioning, cache)]
        for p in range(prefix + 1, N):
            steps.append(model.step(codes[:, p - 1 : p], p, conditioning, cache))
    assert expected.std() > 0.1
    assert torch.allclose(torch.stack(steps, dim=1), expected[:, prefix:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])  # two and three rows are multiplied in a way of their own
@torch.no_grad()
def test_cached_logits_in_float32(batch, monkeypatch):
    monkeypatch.setattr(layers, "LARGE_WEIGHT", 0)
    model = tiny_model(hidden_size=64).float()
    codes, labels = torch.randint(K, (batch, N - 1)), torch.arange(batch)
    conditioning, cache = model.condition(labels), model.make_cache(batch)
    steps = [model.step(None, 0, conditioning, cache)]
    steps += [model.step(codes[:, p - 1 : p], p, conditioning, cache) for p in range(1, N)]
    expected = model(codes, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_cache_can_be_used_again():
    """What a longer sequence left in the cache behind the new end is never read."""
    model, labels = tiny_model(), torch.tensor([1, 2])
    cache, conditioning = model.make_cache(2), model.condition(labels)
    model.step(torch.randint(K, (2, N - 1)), 0, conditioning, cache)
    codes = torch.randint(K, (2, 4))
    model.step(codes[:, :3], 0, conditioning, cache)
    logits = model.step(codes[:, 3:], 4, conditioning, cache)
    assert torch.allclose(logits, model(codes, labels)[:, -1], rtol=0, atol=1e-12)


def test_logits_depend_on_earlier_tokens_only():
    model, labels = tiny_model(), torch.tensor([3])
    codes = torch.randint(K, (1, N - 1))
    base = model(codes, labels)
    for j in range(N - 1):
        changed = codes.clone()
        changed[0, j] = (changed[0, j] + 1) % K
        difference = (model(changed, labels) - base).abs().amax(-1)[0]  # (N,)
        assert difference[: j + 1].max() == 0  # position i predicts token i
        assert difference[j + 1 :].min() > 1e-6


def test_prefix_of_the_sequence_gives_the_same_logits():
    model, labels = tiny_model(), torch.tensor([0, 1])
    codes = torch.randint(K, (2, N - 1))
    full = model(codes, labels)
    for t in range(N):
        assert torch.allclose(model(codes[:, :t], labels), full[:, : t + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_image_does_not_depend_on_its_batch_mates(guidance_scale):
    model, labels = tiny_model(), torch.tensor([4, 0, 7])

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (10, 11, 12)]

    together = sample(model, labels, guidance_scale, generator=generators())
    for i, generator in enumerate(generators()):
        assert sample(model, labels[i : i + 1], guidance_scale, generator=generator).equal(together[i : i + 1])
    assert not together[0].equal(together[1])


def test_guidance_of_one_is_the_conditional_model():
    model, labels = tiny_model(), torch.tensor([4, 0])
    for w, same in [(1.0, True), (1 + 1e-12, True), (4.0, False)]:  # 1 takes the path without unconditional rows
        codes = sample(model, labels, w, generator=torch.Generator().manual_seed(0))
        assert codes.equal(sample(model, labels, 1.0, generator=torch.Generator().manual_seed(0))) is same


def test_given_prefix_stays_and_leads_to_the_same_rest():
    model, labels = tiny_model(), torch.tensor([2, 6])
    whole = sample(model, labels, 2.0, generator=torch.Generator().manual_seed(0))
    for k in range(1, N):
        rest = sample(model, labels, 2.0, generator=torch.Generator().manual_seed(0), prefix=whole[:, :k])
        assert rest.equal(whole)


# ---------------------------------------------------------------------------------------------------- cost


def test_conditioning_is_computed_once_a_sample():
    model, calls = tiny_model(), []
    for module in (model.adaln, model.final_adaln, model.class_embed):
        module.register_forward_hook(lambda *_: calls.append(1))
    sample(model, torch.tensor([0, 1]), 2.0)
    assert len(calls) == 3


def test_step_waits_for_nothing():
    """The meta device holds no values: reading one back raises. One token costs one row of attention."""
    with torch.device("meta"):
        model = SpectralARTransformer(**TINY)
        conditioning, cache = model.condition(torch.empty(2, dtype=torch.long)), model.make_cache(2)
        model.step(torch.empty(2, 3, dtype=torch.long), 0, conditioning, cache)
        logits = model.step(torch.empty(2, 1, dtype=torch.long), 4, conditioning, cache)
    assert logits.shape == (2, K) and not logits.requires_grad


def test_d16_is_the_papers_model():
    preset = PRESETS["d16"]
    assert preset == dict(
        num_classes=1000, codebook_size=4096, num_tokens=64, hidden_size=1024, num_layers=16, num_heads=16
    )
    assert parameter_count(**preset) == pytest.approx(310e6, rel=0.03)


def test_shared_adaln_saves_a_third():
    d16 = PRESETS["d16"]
    assert 0.28 < 1 - parameter_count(**d16, shared_adaln=True) / parameter_count(**d16) < 0.36


# ---------------------------------------------------------------------------------------------------- learning


def test_loss_at_step_0_is_log_k():
    model = SpectralARTransformer(**TINY).train()
    codes, labels = torch.randint(K, (16, N)), torch.randint(CLASSES + 1, (16,))
    loss = F.cross_entropy(model(codes[:, :-1], labels).flatten(0, 1), codes.flatten())
    assert loss.item() == pytest.approx(math.log(K), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    """Head and adaLN start at zero, so it takes the first two steps until all of the network is connected."""
    model = SpectralARTransformer(**TINY, **kind)
    if model.entry_maps is not None:
        model.entry_maps.adopt(torch.randn(K, 4), None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    codes, labels = torch.randint(K, (64, N)), torch.arange(64) % (CLASSES + 1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(codes[:, :-1], labels).flatten(0, 1), codes.flatten()).backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
    assert (model.adaln_table.grad.abs().amax(-1) > 0).all()  # shift, scale and gate of every block
    assert (model.class_embed.weight.grad.abs().amax(-1) > 0).all()  # the null class too


@pytest.fixture(scope="module")
def memorised():
    """Eight sequences, one a class, learnt by heart; a fifth of the labels dropped to the null class."""
    torch.manual_seed(0)
    model = SpectralARTransformer(**TINY, dropout=0.05).train()
    codes = torch.stack([torch.randperm(K)[:N] for _ in range(CLASSES)])
    codes[:, 0] = torch.arange(CLASSES)  # the first token tells the sequence
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)
    for _ in range(200):
        rows = torch.arange(40) % CLASSES
        labels = rows.masked_fill(torch.arange(40) >= 32, model.null_label)
        loss = F.cross_entropy(model(codes[rows, :-1], labels).flatten(0, 1), codes[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), codes


def test_memorises_eight_sequences(memorised):
    model, codes = memorised
    assert sample(model, torch.arange(CLASSES), temperature=0).equal(codes)
    assert sample(model, torch.arange(CLASSES), guidance_scale=2.0).equal(codes)


@torch.no_grad()
def test_null_class_is_the_unconditional_model(memorised):
    """It predicts the marginal of the first token, and from there on the rest of that sequence."""
    model, codes = memorised
    null = torch.full((CLASSES,), model.null_label)
    p = model(codes[:, :-1], null).softmax(-1)  # (B, N, K)
    assert p[0, 0, :CLASSES].tolist() == pytest.approx([1 / CLASSES] * CLASSES, abs=0.03)
    assert p[:, 1:].argmax(-1).equal(codes[:, 1:])
    conditional = model(codes[:, :0], torch.arange(CLASSES)).softmax(-1)[:, 0]
    assert conditional.diagonal().min() > 0.9


def test_dropout_acts_in_training_only():
    model = SpectralARTransformer(**TINY, dropout=0.5).double()
    torch.nn.init.normal_(model.head.weight)
    codes, labels = torch.randint(K, (2, N - 1)), torch.tensor([0, 1])
    assert not model.train()(codes, labels).equal(model(codes, labels))
    assert model.eval()(codes, labels).equal(model(codes, labels))


# ---------------------------------------------------------------------------------------------------- dtype, storage


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(dtype):
    model = tiny_model()
    codes, labels = torch.randint(K, (4, N - 1)), torch.tensor([0, 1, 2, 3])
    expected = model(codes, labels)
    half = model.to(dtype)
    logits = half(codes, labels)
    conditioning, cache = half.condition(labels), half.make_cache(4)
    step = half.step(codes, 0, conditioning, cache)
    assert logits.dtype == step.dtype == torch.float32 and cache.keys[0].dtype == dtype
    near = 0.05 * expected.abs().max()
    assert (logits - expected).abs().max() < near and (step - expected[:, -1]).abs().max() < near


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saving_and_loading_is_exact(tmp_path, dtype):
    model = tiny_model(shared_adaln=True, dropout=0.1).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = SpectralARTransformer.from_pretrained(tmp_path, dtype=dtype)
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".safetensors"]
    assert not loaded.training and loaded.config.shared_adaln and loaded.config.dropout == 0.1
    assert all(loaded.config[name] == value for name, value in TINY.items())
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and ours[name].equal(theirs[name]) for name in ours)


def test_shapes_that_do_not_fit_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=f"t <= {N - 1}"):
        model(torch.zeros(2, N, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"class_labels must have shape \(2,\)"):
        model(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        SpectralARTransformer(**{**TINY, "num_heads": 3})
