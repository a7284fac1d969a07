"""Requests that share steps: each gets what it would get alone, whoever comes and goes beside it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectralar.inference.batch import Request, SamplingBatch
from spectralar.inference.generation import TokenGenerator
from tests.helpers import seed, tiny_transformer

N, K, CLASSES = 12, 32, 4
CAPACITY = 48


@pytest.fixture(scope="module", params=[0, 8], ids=["numbers", "entries"])
def model(request):
    return tiny_transformer(hidden_size=64, codebook_dim=request.param)


def request(batch=1, label=0, number=0, num_tokens=N, prefix=(), **options):
    codes = torch.zeros(batch, num_tokens, dtype=torch.int64)
    codes[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    uniforms = torch.rand(batch, N, generator=seed(number))
    return Request(torch.full((batch,), label), codes, uniforms, len(prefix), **options)


def alone(model, wanted, codebook_sizes=None):
    """The codes of the pipeline's own loop."""
    codes = wanted.codes.clone()
    generator = TokenGenerator(
        model, wanted.class_labels, codes, wanted.uniforms, wanted.guidance_schedule, *wanted.filters,
        codebook_sizes=codebook_sizes,
    )  # fmt: skip
    for index in range(wanted.length, codes.shape[1]):
        generator.sample(index, wanted.guidance_scale)
    return codes


requests = st.builds(
    request,
    batch=st.integers(1, 5),
    label=st.integers(0, CLASSES - 1),
    number=st.integers(0, 10**6),
    num_tokens=st.integers(6, N),
    prefix=st.lists(st.integers(0, K - 1), max_size=5),
    guidance_scale=st.sampled_from([0.0, 1.0, 1.5, 4.0]),
    guidance_schedule=st.sampled_from(["constant", "linear", "cosine"]),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.3]),
    top_k=st.sampled_from([0, 0, 1, 9]),
    top_p=st.sampled_from([1.0, 1.0, 0.8]),
)
# When it comes, and after how many steps it leaves if not before.
visits = st.lists(st.tuples(requests, st.integers(0, 20), st.integers(1, 30)), min_size=1, max_size=8)


@pytest.mark.parametrize("codebook_sizes", [None, [4] * 3 + [16] * 4 + [32] * 5])
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(visits=visits)
def test_codes_are_those_of_each_request_alone(model, codebook_sizes, visits):
    batch = SamplingBatch(model, CAPACITY, codebook_sizes)
    expected = {wanted: alone(model, wanted, codebook_sizes) for wanted, _, _ in visits}
    waiting, inside, lengths = list(visits), {}, {}
    for now in range(200):
        for visit in [visit for visit in waiting if visit[1] <= now]:
            if visit[0].num_rows <= batch.free_rows:
                waiting.remove(visit)
                batch.add(visit[0])
                inside[visit[0]] = now + visit[2]
        batch.step()
        for wanted, until in list(inside.items()):
            if wanted.done or now >= until:
                batch.remove(wanted)
                lengths[wanted] = inside.pop(wanted) and wanted.length
        if not waiting and not inside:
            break
    assert batch.free_rows == CAPACITY and len(lengths) == len(visits)
    for wanted, length in lengths.items():
        assert length >= 1 and torch.equal(wanted.codes[:, :length], expected[wanted][:, :length])


@torch.inference_mode()
@pytest.mark.parametrize("width", [64, 192])
def test_logits_are_the_same_to_the_bit_in_any_company(width):
    """Why codes are: each four rows are multiplied on their own, on one thread."""
    model = tiny_transformer(hidden_size=width, codebook_dim=8)
    if torch.get_num_threads() > 1:
        pytest.skip("holds on one thread")

    def run(rows, places):
        codes, labels = torch.randint(K, (64, N), generator=seed(1)), torch.arange(64) % CLASSES
        cache, conditioning = model.make_cache(rows), model.condition(torch.zeros(rows, dtype=torch.int64))
        own = model.condition(labels[: len(places)] if len(places) >= 4 else labels[:4])
        for ours, new in zip(conditioning, own, strict=True):
            ours[places] = new[: len(places)]
        positions, tokens = torch.randint(N, (rows,), generator=seed(rows)), torch.zeros(rows, dtype=torch.int64)
        out = []
        for index in range(N):
            positions[places], tokens[places] = index, codes[: len(places), index - 1]
            out.append(model.step(tokens[:, None], positions, conditioning, cache)[places])
        return torch.stack(out)

    alone = run(4, torch.tensor([0]))
    assert alone.std() > 0.1
    for rows, place in ((4, 3), (8, 5), (12, 0), (48, 31), (64, 63)):
        assert torch.equal(run(rows, torch.tensor([place])), alone)


def test_there_is_room_for_whole_fours(model):
    assert [SamplingBatch(model, capacity).free_rows for capacity in (1, 6, 8)] == [4, 8, 8]


def test_buffers_are_made_once(model):
    batch = SamplingBatch(model, 16)

    def addresses():
        tensors = [*batch._conditioning, *batch._cache.keys, batch._codes, batch._uniforms, batch._tokens]
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    for number in range(40):
        wanted = request(1 + number % 4, number=number, guidance_scale=1.0 + number % 2)
        batch.add(wanted)
        while not wanted.done:
            batch.step()
    assert addresses() == before and batch.free_rows == 16 and len(batch._caches) <= 4


def test_what_is_not_a_number_stays_with_who_brought_it(model):
    batch, bad, good = SamplingBatch(model, 8), request(4), request(4, number=3)
    expected = alone(model, good)
    batch.add(bad)
    with torch.inference_mode():
        for buffer in (*batch._cache.keys, *batch._cache.values):
            buffer.fill_(torch.nan)
    batch.remove(bad)
    batch.add(good)
    while not good.done:
        batch.step()
    assert torch.equal(good.codes, expected)


def test_a_request_that_only_lacks_one_token(model):
    whole = request(2, number=5, guidance_scale=2.0)
    codes = alone(model, whole)
    batch, last = SamplingBatch(model, 16), replace(whole, codes=codes.clone(), length=N - 1)
    last.codes[:, -1] = 0
    batch.add(last)
    assert last.done and torch.equal(last.codes, codes) and batch.free_rows == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_given_prefix_changes_nothing_in_half_precision(dtype):
    """As the pipeline's loop promises: one's own first tokens, given, are continued by the same ones."""
    model = tiny_transformer(num_layers=4).to(dtype)

    def codes(label, prefix=(), **options):
        batch, wanted = SamplingBatch(model, 16), request(4, label, number=label, prefix=prefix, **options)
        batch.add(wanted)
        while not wanted.done:
            batch.step()
        return wanted.codes

    for label in range(CLASSES):
        for scale in (1.0, 3.0):
            for number, row in enumerate(codes(label, guidance_scale=scale)):
                for k in (1, 6, 11):
                    continued = codes(label, row[:k].tolist(), guidance_scale=scale)
                    assert torch.equal(continued[number], row)


def test_logits_that_are_not_finite_are_known_by_request():
    """Those of a class whose embedding is no number; neighbours go on."""
    model = tiny_transformer()
    model.class_embed.weight.data[1] = torch.nan
    batch, good = SamplingBatch(model, 24), request(2, 0, number=1, guidance_scale=2.0)
    expected = alone(model, good)
    bad = [request(2, 1, number=2, guidance_scale=scale, prefix=given) for scale in (1.0, 2.0) for given in ((), (3,))]
    bad.append(request(2, 1, prefix=[3] * (N - 1)))  # which leaves at once
    for wanted in (good, *bad):
        batch.add(wanted)
    batch.step()
    for wanted in bad:
        batch.read(wanted)
        assert not wanted.finite
    while not good.done:
        batch.step()
    assert good.finite and torch.equal(good.codes, expected)
    model.class_embed.weight.data[1], model.class_embed.weight.data[CLASSES] = 0, torch.nan  # the null class
    without, guided = request(1, 0), request(1, 0, guidance_scale=2.0)
    batch = SamplingBatch(model, 16)
    for wanted in (without, guided):
        batch.add(wanted)
    batch.step()
    batch.read(without), batch.read(guided)
    assert without.finite and not guided.finite
