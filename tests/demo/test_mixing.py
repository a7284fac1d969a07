import numpy as np
import pytest
import torch

from spectralar.demo.mixing import VARIATIONS, Continuation, continuations, exchange, exchange_value
from spectralar.demo.model import to_pixels
from spectralar.demo.scrubber import StripEncoder
from spectralar.demo.source import Origins
from spectralar.spectral import band_pass, low_pass


@pytest.fixture(scope="module")
def pictures(model):
    origins = Origins(model)
    return origins.picture("sample:0:1", None), origins.picture("sample:3:2", None)


def test_exchange_of_heads_and_tails(model, pictures):
    a, b = pictures
    codes, images = exchange(model, a, b)
    assert len(codes) == 12 and codes[4] == a.codes[:5] + b.codes[5:] and codes[-1] == a.codes
    np.testing.assert_array_equal(images[4], model.decode([codes[4]], [12])[0, 0])
    np.testing.assert_array_equal(images[-1], to_pixels(a.image / 2 + 0.5))


def test_exchange_is_shown_beside_that_of_frequencies(model, pictures, monkeypatch):
    a, b = pictures
    strips = []
    monkeypatch.setattr(StripEncoder, "encode", lambda self, tiles: strips.append(tiles) or "")
    _, images = exchange(model, a, b)
    value = exchange_value(model, a, b, images)
    assert len(value["groups"][0]["captions"]) == len(strips[0]) == 4 and len(strips) == 12
    k = 7
    mixed, plain, first, second = strips[k - 1]
    np.testing.assert_array_equal(mixed, images[k - 1])
    r = model.cutoffs[k - 1]
    expected = low_pass(a.image, r) + band_pass(b.image, r, 16)
    np.testing.assert_allclose(plain, to_pixels((expected / 2 + 0.5).clamp(0, 1)), atol=1)
    np.testing.assert_array_equal(first, images[-1])
    np.testing.assert_array_equal(second, to_pixels(b.image / 2 + 0.5))


def test_continuations_are_the_pipelines_from_every_prefix(model, pictures):
    a, _ = pictures
    steps = list(continuations(model, 2, a.codes, seed=4, guidance_scale=1.5))
    rows, images = zip(*[step for step in steps if step is not None], strict=True)
    assert len(rows) == 12 and all(len(row) == VARIATIONS for row in rows)
    for codes, pixels in zip(rows, images, strict=True):
        np.testing.assert_allclose(pixels.astype(int), model.decode(codes, [12])[:, 0].astype(int), atol=1)
    for k in (1, 7, 11):
        expected = model.pipe(
            2, num_images_per_prompt=VARIATIONS, guidance_scale=1.5, prefix_codes=[a.codes[:k]],
            generator=torch.manual_seed(4), output_type="latent",
        ).codes  # fmt: skip
        assert rows[k - 1] == expected.tolist()
        assert all(row[:k] == a.codes[:k] for row in rows[k - 1])
    assert rows[-1] == [a.codes] * VARIATIONS
    assert len({tuple(row) for row in rows[0]}) > 1


def test_a_stopped_continuation_keeps_what_is_there(model, pictures):
    a, _ = pictures
    run = Continuation(model)
    assert run.value["busy"] and not run.codes
    for news in continuations(model, 2, a.codes, 4, 2.0):
        if news is not None:
            run.add(*news, seconds=1.0)
        if len(run.images) == 3:
            break
    assert run.value["status"].startswith("3 of 12 exchange points · ")
    before = run.snapshot()
    run.finish(stopped=True)
    assert run.value["status"] == "Stopped after 3 of 12 exchange points" and not run.value["busy"]
    assert len(before["frames"]) == 3 and before["busy"]
    chart = run.chart()
    assert chart.columns["tokens_of_a"] == [1, 2, 3]
    assert chart.columns["codes"][2].startswith(" ".join(map(str, a.codes[:3])))
    np.testing.assert_array_equal(chart.axes[0].images[1].get_array(), run.images[1][0])


def test_time_left_is_measured_in_tokens(model, pictures):
    """Of 66 tokens from prefixes of 1, 2, .. 11, the first three exchange points take 11 + 10 + 9 = 30."""
    run = Continuation(model)
    rows = [pictures[0].codes] * VARIATIONS
    for _ in range(3):
        run.add(rows, np.zeros((VARIATIONS, 16, 16), np.uint8), seconds=30.0)
    assert run.value["status"] == "3 of 12 exchange points · 36 s left"
