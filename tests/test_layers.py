"""Attention and blocks against torch's own; the cache against running the whole sequence again."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectralar import layers
from spectralar.layers import (
    MLP,
    AdaLNBlock,
    Attention,
    Block,
    KVCache,
    adaln_step,
    attend,
    block_inputs,
    init_weights,
    linear,
)
from tests.helpers import add_noise

D, HEADS, T = 24, 3, 7


@pytest.fixture
def x():
    return torch.randn(2, T, D, dtype=torch.float64)


@pytest.fixture
def mask():
    """(T, T), True where to attend: anything, with at least the token itself."""
    return (torch.rand(T, T) < 0.4) | torch.eye(T, dtype=torch.bool)


def as_torchs(attention: Attention) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(D, HEADS, batch_first=True).double()
    theirs.in_proj_weight, theirs.in_proj_bias = attention.to_qkv.weight, attention.to_qkv.bias
    theirs.out_proj.weight, theirs.out_proj.bias = attention.to_out.weight, attention.to_out.bias
    return theirs


# Attention ------------------------------------------------------------------------------------------------


def test_attention_is_torchs(x, mask):
    ours = add_noise(Attention(D, HEADS).double())
    theirs = as_torchs(ours)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])
    torch.testing.assert_close(ours(x, mask), theirs(x, x, x, attn_mask=~mask)[0])
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, x, x, attn_mask=~causal)[0])


def test_a_mask_for_each_image(x):
    attention = Attention(D, HEADS).double()
    masks = torch.rand(2, 1, 1, T) < 0.5
    masks[..., 0] = True
    for image in range(2):
        torch.testing.assert_close(attention(x, masks)[image], attention(x[image : image + 1], masks[image])[0])


@pytest.mark.parametrize("learning", [True, False])
def test_under_autocast_what_is_learnt_from_is_attended_to_in_float32(learning):
    q, k, v = (torch.randn(2, 2, 5, 8).bfloat16().requires_grad_() for _ in range(3))
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(learning):
        mixed = attend(q, k, v, is_causal=True)
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, expected.bfloat16() if learning else plain)
    assert not torch.equal(plain, expected.bfloat16()), "the two ways round alike here: choose other numbers"
    if learning:
        mixed.float().sum().backward()
        assert all(x.grad is not None and x.grad.dtype == x.dtype for x in (q, k, v))


def test_qk_norm_bounds_the_logits(x):
    attention = add_noise(Attention(D, HEADS, qk_norm=True).double())
    nn.init.zeros_(attention.to_qkv.bias)
    before = attention(x)
    q, k, _ = attention.qkv(x)
    assert q.shape == (2, HEADS, T, D // HEADS)
    gain = attention.norm_q.weight.abs().max() * attention.norm_k.weight.abs().max()
    assert (q @ k.mT).abs().max() <= gain * attention.head_dim
    with torch.no_grad():  # the length of queries and keys does not count
        attention.to_qkv.weight[:D] *= 7
        attention.to_qkv.weight[D : 2 * D] *= 1e3
    torch.testing.assert_close(attention(x), before, rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # that of values does
        attention.to_qkv.weight[2 * D :] *= 2
    torch.testing.assert_close(
        attention(x) - attention.to_out.bias, 2 * (before - attention.to_out.bias), rtol=1e-4, atol=1e-6
    )


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size 24 must be a multiple of num_heads 5"):
        Attention(24, 5)


@pytest.mark.parametrize("outputs", [30, 32])  # 30 do not make four blocks
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_of_few_rows_is_torchs(rows, dtype, outputs, monkeypatch):
    monkeypatch.setattr(layers, "LARGE_WEIGHT", 0)
    monkeypatch.setattr(layers, "BLOCK_WIDTH", 8)
    x, weight, bias = torch.randn(rows, 40).to(dtype), torch.randn(outputs, 40).to(dtype), torch.randn(outputs)
    bias = bias.to(dtype)
    blocks = block_inputs(weight, rows)
    assert (blocks.shape == (5, outputs, 8)) == (rows <= 4 and dtype == torch.float32)
    for form in (weight, blocks):
        out = linear(x, form, bias)
        assert out.is_contiguous() and out.dtype == dtype
        torch.testing.assert_close(out, F.linear(x, weight, bias))


IN_ORDER = """
import torch
from spectralar.layers import by_columns, linear
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
for inputs, outputs in ((128, 384), (512, 128), (192, 192), (768, 192), (16, 4096), (256, 1024), (1024, 256)):
    weight = by_columns(torch.randn(outputs, inputs, generator=generator))
    rows = torch.randn(320, inputs, generator=generator)
    for bias in (None, torch.randn(outputs, generator=generator)):
        whole = linear(rows, weight, bias)
        torch.testing.assert_close(whole, torch.nn.functional.linear(rows, weight, bias), rtol=1e-4, atol=1e-4)
        for count in (4, 8, 20, 160):
            picked = torch.randperm(320, generator=generator)[:count]
            assert torch.equal(linear(rows[picked], weight, bias), whole[picked]), (inputs, outputs, count)
print("in order")
"""


@pytest.mark.parametrize("instructions", ["", "AVX2", "SSE4_2"])  # of Intel's CPUs; on others as they are
def test_with_a_weight_by_columns_a_row_is_the_same_to_the_bit_wherever_it_is(instructions):
    env = os.environ | ({"MKL_ENABLE_INSTRUCTIONS": instructions} if instructions else {})
    assert subprocess.check_output([sys.executable, "-c", IN_ORDER], env=env, text=True) == "in order\n"


def test_only_large_weights_with_many_inputs_are_copied():
    for shape in ((1024, 1024), (64, 4096 + 8), (16, 2048)):
        weight = torch.randn(shape)
        assert block_inputs(weight, 2) is weight
    weight = torch.randn(256, 4096)
    assert block_inputs(weight, 2).shape == (8, 256, 512) and block_inputs(weight, 5) is weight


# MLP and blocks -------------------------------------------------------------------------------------------


def test_mlp(x):
    mlp = add_noise(MLP(D, 2.5).double())
    assert mlp.up.out_features == 60
    hidden = x @ mlp.up.weight.T + mlp.up.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(mlp(x), hidden @ mlp.down.weight.T + mlp.down.bias)


def test_block_is_torchs_pre_norm_layer(x, mask):
    ours = add_noise(Block(D, HEADS, 2.0).double())
    theirs = nn.TransformerEncoderLayer(
        D, HEADS, 2 * D, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    theirs.self_attn = as_torchs(ours.attn)
    theirs.norm1, theirs.norm2 = ours.norm1, ours.norm2
    theirs.linear1, theirs.linear2 = ours.mlp.up, ours.mlp.down
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, mask), theirs(x, src_mask=~mask))


def test_adaln_block_is_modulated(x):
    block = add_noise(AdaLNBlock(D, HEADS, 2.0).double())
    modulation = torch.randn(2, 6, D, dtype=torch.float64)
    shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, None] for m in modulation.unbind(1))
    hidden = x + gate1 * block.attn(scale1 * F.layer_norm(x, (D,), eps=1e-6) + shift1, is_causal=True)
    expected = hidden + gate2 * block.mlp(scale2 * F.layer_norm(hidden, (D,), eps=1e-6) + shift2)
    torch.testing.assert_close(block(x, modulation), expected)
    closed = modulation.clone()
    closed[:, [2, 5]] = 0  # closed gates: the identity
    assert torch.equal(block(x, closed), x)


# Cache ----------------------------------------------------------------------------------------------------


def test_the_cache_returns_what_was_written():
    like = torch.zeros((), dtype=torch.float64)
    cache = KVCache(2, 3, HEADS, 5, 4, like)
    keys, values = torch.randn(2, 3, HEADS, 5, 4, dtype=torch.float64)
    addresses = set()
    for start, end in ((0, 2), (2, 3), (3, 5)):
        for layer, sign in enumerate((1, -1)):
            k, v = cache.write(layer, start, sign * keys[:, :, start:end], sign * values[:, :, start:end])
            assert torch.equal(k, sign * keys[:, :, :end])
            assert torch.equal(v, sign * values[:, :, :end])
            addresses.add((layer, k.data_ptr(), v.data_ptr()))
    assert len(addresses) == 2  # written in place


@torch.no_grad()  # a cache is for sampling: it is written in place
def test_token_by_token_is_the_whole_sequence(x):
    block = add_noise(AdaLNBlock(D, HEADS).double())
    modulation = torch.randn(2, 6, D, dtype=torch.float64)
    whole = block(x, modulation)
    cache = KVCache(1, 2, HEADS, T, D // HEADS, x)
    parts = [block(x[:, :3], modulation, cache)]  # a prefix at once, then one at a time
    for t in range(3, T):
        parts.append(
            adaln_step(x[:, t], block.step_parameters(len(x)), modulation.unbind(1), cache.slots(t)[0])[:, None]
        )
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@torch.no_grad()
def test_sequences_may_be_at_different_places(x):
    """Each as if it were alone, whatever lies in the cache behind it."""
    block = add_noise(AdaLNBlock(D, HEADS).double())
    modulation = torch.randn(2, 6, D, dtype=torch.float64)
    whole = block(x, modulation)
    cache = KVCache(1, 2, HEADS, T, D // HEADS, x)
    block(x.flip(1), modulation, cache)  # left behind by others
    for t in range(T):
        places = torch.tensor([t, max(0, t - 2)])
        tokens = torch.stack([x[i, place] for i, place in enumerate(places)])
        out = adaln_step(tokens, block.step_parameters(2), modulation.unbind(1), cache.slots(places)[0])
        torch.testing.assert_close(out, torch.stack([whole[i, place] for i, place in enumerate(places)]))


def test_part_of_a_cache_is_the_same_memory():
    cache = KVCache(2, 3, HEADS, 5, 4, torch.zeros((), dtype=torch.float64))
    part = cache.narrow(2)
    for layer, slot in enumerate(part.slots(torch.tensor([1, 4]))):
        slot.keys.view(-1, 4).index_fill_(0, slot.places, 1 + layer)
    for layer in range(2):
        filled = torch.zeros(3, HEADS, 5)
        filled[0, :, 1] = filled[1, :, 4] = 1 + layer
        assert torch.equal(cache.keys[layer], filled[..., None].double().expand(-1, -1, -1, 4))
    other = KVCache(2, 2, HEADS, 5, 4, torch.zeros((), dtype=torch.float64))
    other.write(1, 0, *torch.ones(2, 1, HEADS, 5, 4, dtype=torch.float64))
    cache.take(torch.tensor([2]), other)
    assert cache.keys[1][2].eq(1).all() and cache.values[1][2].eq(1).all() and not cache.keys[0][2].any()


# Initialisation -------------------------------------------------------------------------------------------


def test_init_weights():
    model = nn.Sequential(
        nn.Embedding(200, 100), nn.Linear(100, 300), nn.Linear(300, 100, bias=False), nn.LayerNorm(9)
    )
    init_weights(model)
    assert model[0].weight.std().item() == pytest.approx(0.02, rel=0.03)
    bound = math.sqrt(6 / 400)  # Glorot and Bengio 2010, equation 16
    for weight in (model[1].weight, model[2].weight):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not model[1].bias.any()
    assert (model[3].weight == 1).all()
