"""Decoder feedback: what is expected of the next token, and sampling with it in every way there is."""

import threading
import time

import pytest
import torch

from spectralar.inference.engine import Engine
from spectralar.inference.feedback import DecoderFeedback, all_logits, expected_latents, feedback_for
from spectralar.spectral import dct2
from tests.helpers import seed, tiny_pipeline, tiny_tokenizer, tiny_transformer

N, LISTENS = 12, {"codebook_dim": 8, "decoder_feedback": True}
SHORTCUT = {"spectral_shortcut": True, "encoder_layers": 0}


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline(tokenizer=SHORTCUT, transformer=LISTENS)
    with torch.no_grad():
        pipe.transformer.entry_maps.expected.mul_(0.2)  # else the decoder's word is nearly the last
    return pipe


@pytest.fixture
def codes():
    return torch.randint(32, (3, N), generator=seed(1))


def latents(pipe, **settings):
    return pipe([1, 2], generator=seed(5), output_type="latent", **settings).codes


def test_expected_is_the_latent_of_the_decoders_image(pipe, codes):
    tokenizer, shortcut = pipe.tokenizer, pipe.tokenizer.shortcut
    expected = expected_latents(tokenizer, codes, range(N))
    assert expected.shape == (3, N, 8) and not expected[:, 0].any()
    for k in (1, 4, N - 1):
        spectrum = shortcut.begin(len(codes))
        for i in range(k):
            shortcut.add(spectrum, tokenizer.quantizer.lookup(codes[:, i]), i)
        z = shortcut.analyse(dct2(tokenizer.decode(codes, k)), spectrum, k)
        torch.testing.assert_close(expected[:, k], torch.nn.functional.normalize(z, dim=-1).to(expected))
    some = expected_latents(tokenizer, codes, [7, 0, 2])
    torch.testing.assert_close(some, expected[:, [7, 0, 2]])


def test_many_images_are_done_some_at_a_time(pipe, codes, monkeypatch):
    expected = expected_latents(pipe.tokenizer, codes, [3, 9])
    monkeypatch.setattr("spectralar.inference.feedback.FRAMES_AT_ONCE", 4)
    torch.testing.assert_close(expected_latents(pipe.tokenizer, codes, [3, 9]), expected)


def test_later_tokens_say_nothing(pipe, codes):
    other = torch.cat([codes[:, :6], (codes[:, 6:] + 1) % 32], dim=1)
    a, b = (expected_latents(pipe.tokenizer, c, range(N)) for c in (codes, other))
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-3


def test_token_by_token_is_all_at_once_however_many_were_known(pipe, codes):
    expected = expected_latents(pipe.tokenizer, codes, range(N))
    steps, late = DecoderFeedback(pipe.tokenizer, 3), DecoderFeedback(pipe.tokenizer, 3)
    for k in range(1, N):
        torch.testing.assert_close(steps.after(codes[:, :k]).to(expected), expected[:, k])
        torch.testing.assert_close(steps.image(codes[:, :k]), pipe.tokenizer.decode(codes, k))
    assert torch.equal(late.after(codes[:, : N - 1]), steps.after(codes[:, : N - 1]))  # to the bit
    with pytest.raises(ValueError, match="11 tokens have been taken in, got 3: restart first"):
        steps.image(codes[:, :3])
    steps.restart()
    assert torch.equal(steps.after(codes[:, :3]), DecoderFeedback(pipe.tokenizer, 3).after(codes[:, :3]))


def test_what_is_expected_moves_the_logits_to_the_codes_near_it(pipe, codes):
    labels = torch.tensor([0, 1, 3])
    logits = all_logits(pipe.transformer, pipe.tokenizer, codes, labels)
    expected = expected_latents(pipe.tokenizer, codes, range(N)).to(logits)
    silent = pipe.transformer(codes[:, :-1], labels, torch.zeros_like(expected))
    maps = pipe.transformer.entry_maps
    added = 30 * torch.einsum("kd,tde,bte->btk", maps.entries, maps.expected, expected)
    torch.testing.assert_close(logits - silent, added)
    for k in (0, 5):
        heard = pipe.transformer.add_expected(silent[:, k], expected[:, k], k, pipe.transformer.make_cache(3))
        torch.testing.assert_close(heard, logits[:, k])
    at = torch.tensor([5, 0, 9])
    each = torch.arange(3)
    moved = pipe.transformer.add_expected(silent[each, at], expected[each, at], at, pipe.transformer.make_cache(3))
    torch.testing.assert_close(moved, logits[each, at])


def test_logits_at_some_positions_are_those_of_all(pipe, codes):
    labels, at = torch.tensor([0, 1, 3]), torch.tensor([0, 2, 11])
    expected = expected_latents(pipe.tokenizer, codes, at.tolist())
    some = pipe.transformer(codes[:, :-1], labels, expected, at)
    torch.testing.assert_close(some, all_logits(pipe.transformer, pipe.tokenizer, codes, labels)[:, at])


def test_gradients_reach_the_maps(pipe, codes):
    pipe.transformer.zero_grad()
    all_logits(pipe.transformer, pipe.tokenizer, codes, torch.tensor([0, 1, 3])).logsumexp(-1).sum().backward()
    grad = pipe.transformer.entry_maps.expected.grad
    assert not grad[0].any() and (grad[1:].abs().amax((1, 2)) > 0).all()  # before the first token there is nothing
    pipe.transformer.zero_grad()


def test_a_transformer_that_listens_must_be_told_and_another_must_not(pipe, codes):
    labels = torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match="decoder_feedback is True: expected must be given"):
        pipe.transformer(codes[:, :-1], labels)
    with pytest.raises(ValueError, match="decoder_feedback is False: expected must be None"):
        tiny_transformer()(codes[:, :-1], labels, torch.zeros(3, N, 8))
    with pytest.raises(ValueError, match="decoder_feedback needs codebook_dim"):
        tiny_transformer(decoder_feedback=True)


def test_sampling_draws_from_the_logits_of_the_whole_sequence(pipe):
    codes = latents(pipe, guidance_scale=1.0)
    logits = all_logits(pipe.transformer, pipe.tokenizer, codes, torch.tensor([1, 2]))
    uniforms = torch.rand(2, N, generator=seed(5)).double()
    assert torch.equal((logits.softmax(-1).cumsum(-1) < uniforms[..., None]).sum(-1), codes)
    silent = tiny_pipeline(tokenizer=SHORTCUT, transformer={"codebook_dim": 8})
    silent.transformer.load_state_dict(pipe.transformer.state_dict(), strict=False)
    assert not torch.equal(latents(silent, guidance_scale=1.0), codes)  # it does listen


def test_one_goes_on_from_a_prefix_of_ones_own(pipe):
    codes = latents(pipe)
    for k in (1, 7, N - 1):
        assert torch.equal(latents(pipe, prefix_codes=codes[:, :k]), codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_on_as_it_began(dtype):
    pipe = tiny_pipeline(tokenizer=SHORTCUT, transformer=LISTENS, dtype=dtype)
    codes = latents(pipe)
    for k in (1, 7, N - 1):
        assert torch.equal(latents(pipe, prefix_codes=codes[:, :k]), codes)
    assert torch.equal(torch.stack([step.codes[:, -1] for step in pipe.stream([1, 2], generator=seed(5))], 1), codes)


def test_autocast_around_a_run_changes_no_code_and_no_image():
    pipe = tiny_pipeline(tokenizer=SHORTCUT, transformer=LISTENS, dtype=torch.float32)
    expected = latents(pipe)
    without = [step.images for step in pipe.stream([1, 2], generator=seed(5), output_type="pt")]
    with torch.autocast("cpu", torch.bfloat16):
        steps = list(pipe.stream([1, 2], generator=seed(5), output_type="pt"))  # frames are made before the next token
        assert torch.equal(latents(pipe), expected)
    assert torch.equal(steps[-1].codes, expected)
    assert all(torch.equal(step.images, images) for step, images in zip(steps, without, strict=True))


def test_an_image_is_the_same_alone_and_beside_others(pipe):
    both = pipe([1, 2], generator=[seed(3), seed(4)], output_type="latent").codes
    assert torch.equal(pipe(2, generator=seed(4), output_type="latent").codes, both[1:])


@pytest.mark.parametrize("every", [1, 5])
def test_frames_of_a_stream_are_those_of_its_codes(pipe, every):
    prefix = latents(pipe)[:, :3]
    arguments = {"generator": seed(5), "output_type": "pt", "prefix_codes": prefix, "every": every}
    steps = list(pipe.stream([1, 2], **arguments))
    assert torch.equal(steps[-1].codes, latents(pipe))
    for step in steps:
        torch.testing.assert_close(step.images, pipe.decode(step.codes))


def test_a_callback_that_changes_tokens_is_heard_by_the_decoder_too(pipe):
    given = latents(pipe)[:, :7]
    changed = given.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 32

    def change(pipe, step, timestep, kwargs):
        return {"latents": changed} if kwargs["latents"].shape[1] == 7 else {}

    steps = list(pipe.stream([1, 2], generator=seed(5), output_type="pt", callback_on_step_end=change))
    assert torch.equal(steps[-1].codes, latents(pipe, prefix_codes=changed))
    for step in steps[6:]:
        torch.testing.assert_close(step.images, pipe.decode(step.codes))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_engine_serves_the_same_codes_and_frames(pipe, workers, monkeypatch):
    prefix, names, image = latents(pipe)[:, :7], set(), DecoderFeedback.image

    def watched(self, codes):
        names.add(threading.current_thread().name.partition("_")[0])
        return image(self, codes)

    monkeypatch.setattr(DecoderFeedback, "image", watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    engine = Engine(pipe.transformer, pipe.tokenizer, workers=workers)
    asked = [
        (dict(class_labels=[1, 2]), "all"), (dict(class_labels=3, guidance_scale=1.0, num_tokens=9), "all"),
        (dict(class_labels=[1, 2], prefix_codes=prefix), "all"), (dict(class_labels=0), "last"),
        (dict(class_labels=2, prefix_codes=prefix[:1]), "none"),
    ]  # fmt: skip
    served = [engine.sample(pipe.request(generator=seed(5), **arguments), i, wanted) for i, (arguments, wanted)
              in enumerate(asked)]  # fmt: skip
    for (arguments, wanted), sampling in zip(asked, served, strict=True):
        frames = [frame for frame in sampling if frame is not None]
        alone = pipe(generator=seed(5), output_type="latent", **arguments).codes
        assert torch.equal(frames[-1].codes, alone)
        first = arguments.get("prefix_codes", alone[:, :1]).shape[1]
        lengths = {"all": list(range(first, alone.shape[1] + 1)), "last": [N], "none": [N]}[wanted]
        assert [frame.codes.shape[1] for frame in frames] == lengths
        for frame in frames if wanted != "none" else ():
            torch.testing.assert_close(frame.images, pipe.decode(frame.codes))
    assert ("decoding" in names) == (workers > 1)


def test_what_has_been_served_keeps_no_decoder(pipe):
    engine = Engine(pipe.transformer, pipe.tokenizer)
    whole, left = (engine.sample(pipe.request(1, generator=seed()), wanted=wanted) for wanted in ("last", "all"))
    left.close()
    assert [frame for frame in whole if frame] and whole.request.feedback is None
    deadline = time.monotonic() + 60
    while engine.num_requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert left.request.feedback is None


@pytest.mark.parametrize(("tokenizer", "said"), [
    (None, "there is no tokenizer"), (tiny_tokenizer(), "the tokenizer has no spectral shortcut"),
])  # fmt: skip
def test_without_a_decoder_to_listen_to_there_is_a_sentence(pipe, tokenizer, said):
    half = type(pipe)(tokenizer, pipe.transformer)
    with pytest.raises(ValueError, match=f"predicts each token from the decoder's image .* {said}"):
        half(1, output_type="latent")
    assert feedback_for(tiny_transformer(), None, 1) is None  # nobody listens


def test_it_is_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, dtype=torch.float64)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents(loaded), latents(pipe))
