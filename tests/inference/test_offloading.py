"""Components that move or are cast around each use: the same results, and each is there when it is needed."""

from contextlib import contextmanager

import accelerate
import pytest
import torch

from spectralar.inference.frames import PrefixDecoder
from tests.helpers import seed, tiny_pipeline

N = 12  # tokens of the tiny models
KINDS = {"tokenizer": {"spectral_shortcut": True}, "transformer": {"codebook_dim": 8}}
FEEDBACK = {"tokenizer": {"spectral_shortcut": True}, "transformer": {"codebook_dim": 8, "decoder_feedback": True}}


@pytest.fixture
def onloaded(monkeypatch):
    """Names of the models in the order in which the offload hooks bring them to the device."""
    from accelerate.hooks import CpuOffload

    names = []
    real = CpuOffload.pre_forward

    def pre_forward(self, module, *args, **kwargs):
        names.append({"SpectralTokenizer": "tok", "SpectralARTransformer": "ar"}[type(module).__name__])
        return real(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    return names


def test_model_cpu_offload(onloaded):
    pipe = tiny_pipeline()
    expected = pipe([1, 2], generator=seed(), output_type="pt")
    pipe.enable_model_cpu_offload(device="cpu")
    out = pipe([1, 2], generator=seed(), output_type="pt")
    assert torch.equal(out.images, expected.images)
    assert onloaded == ["ar"] * N + ["tok"]  # each is there before it is used
    assert pipe.tokenizer._hf_hook.prev_module_hook.model is pipe.transformer  # which leaves when the other comes
    # Freed, and put in place again for the next call.
    assert len(pipe._all_hooks) == 2 and all(hasattr(model, "_hf_hook") for model in pipe.components.values())
    onloaded.clear()
    frames = [event.images for event in pipe.stream([1, 2], generator=seed(), output_type="pt", every=6)]
    assert torch.allclose(frames[-1], expected.images, atol=1e-10)
    assert onloaded == ["ar"] * 6 + ["tok"] + ["ar"] * 6 + ["tok"] * 2  # the last frame waits for others, and the end
    onloaded.clear()
    assert torch.equal(pipe.encode(pipe.decode(out.codes)), tiny_pipeline().encode(expected.images))
    assert onloaded == ["tok", "tok"]


def test_model_cpu_offload_with_decoder_feedback(onloaded):
    """The decoder comes for what it expects of each token but the first."""
    expected = tiny_pipeline(**FEEDBACK)(1, generator=seed(), output_type="pt")
    pipe = tiny_pipeline(**FEEDBACK)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe(1, generator=seed(), output_type="pt").images, expected.images)
    assert onloaded == ["ar", *["tok", "ar"] * (N - 1), "tok"]


@pytest.mark.parametrize("kinds", [{}, KINDS, FEEDBACK], ids=["plain", "shortcut", "feedback"])
def test_sequential_offload(kinds):
    """Every part has its weights for as long as the component is used, and gives them back."""
    pipe, whole = tiny_pipeline(dtype=torch.float32, **kinds), tiny_pipeline(dtype=torch.float32, **kinds)
    for model in pipe.components.values():  # as enable_sequential_cpu_offload does; that one refuses CPUs
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    pipe._offload_device = torch.device("cpu")
    x = torch.rand(2, 1, 16, 16)
    for arguments in ({"guidance_scale": 1.0}, {"guidance_scale": 3.0}, {"prefix_codes": [[1, 2, 3]]}):
        arguments = {"class_labels": [0, 3], "output_type": "pt", **arguments}
        outs = [each(generator=seed(), **arguments) for each in (pipe, whole)]
        assert torch.equal(outs[0].codes, outs[1].codes) and torch.equal(outs[0].images, outs[1].images)
        pairs = zip(*(each.stream(generator=seed(), **arguments) for each in (pipe, whole)), strict=True)
        assert all(torch.equal(ours.images, theirs.images) for ours, theirs in pairs)
    assert torch.equal(pipe.encode(x), whole.encode(x))
    assert torch.equal(pipe.decode(outs[0].codes, [1, 5]), whole.decode(outs[0].codes, [1, 5]))
    assert {p.device.type for model in pipe.components.values() for p in model.parameters()} == {"meta"}


def test_all_that_is_decoded_is_decoded_on_the_device(monkeypatch):
    """Frames that a callback's change or the end brings, too: another run may have moved the tokenizer meanwhile."""
    pipe, inside = tiny_pipeline(), []
    real, real_frames = type(pipe)._on_device, PrefixDecoder.frames

    @contextmanager
    def on_device(self, module):
        with real(self, module):
            inside.append(module)
            yield
            inside.pop()

    def frames(self, lengths):
        assert inside == [pipe.tokenizer]
        return real_frames(self, lengths)

    monkeypatch.setattr(type(pipe), "_on_device", on_device)
    monkeypatch.setattr(PrefixDecoder, "frames", frames)

    def change(pipe, step, index, kwargs):
        kwargs["latents"][:, 0] = index
        return kwargs

    for callback in (None, change):
        assert len(list(pipe.stream(1, callback_on_step_end=callback))) == N


def test_group_offloading_is_refused():
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="SpectralTokenizer does not support group offloading"):
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


# Weights in 8 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [{}, KINDS], ids=["plain", "shortcut"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_weights_stored_in_8_bits(compute, kinds):
    """As diffusers casts them at each use: the same as if they had been rounded to 8 bits beforehand."""
    for name in ("tokenizer", "transformer"):
        cast, rounded = tiny_pipeline(dtype=torch.float32, **kinds), tiny_pipeline(dtype=torch.float32, **kinds)
        getattr(cast, name).enable_layerwise_casting(torch.float8_e4m3fn, compute)
        model = getattr(rounded, name)
        stored = getattr(cast, name).state_dict()
        assert torch.float8_e4m3fn in {weight.dtype for weight in stored.values()}
        model.load_state_dict({key: weight.float() for key, weight in stored.items()})
        model.to(compute)
        x = torch.rand(2, 1, 16, 16)
        for scale in (1.0, 3.0):
            arguments = {"guidance_scale": scale, "prefix_codes": [[1, 2]], "output_type": "pt"}
            outs = [p([0, 3], generator=seed(), **arguments) for p in (cast, rounded)]
            assert torch.equal(outs[0].codes, outs[1].codes) and torch.equal(outs[0].images, outs[1].images)
        assert torch.equal(cast.encode(x), rounded.encode(x))
        *_, last = cast.stream([0, 3], generator=seed(), **arguments)
        assert torch.equal(last.codes, outs[0].codes)
        assert {key: weight.dtype for key, weight in getattr(cast, name).state_dict().items()} == {
            key: weight.dtype for key, weight in stored.items()
        }


def test_weights_stored_in_8_bits_are_cast_at_each_use_and_not_kept():
    model = tiny_pipeline(dtype=torch.float32).transformer
    kept = model.make_cache(4).weights
    assert kept.block(0).up_weight is kept.block(0).up_weight and kept.head is kept.head
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    cast = model.make_cache(4).weights
    assert cast.block(0).up_weight is not cast.block(0).up_weight and cast.head is not cast.head
    assert cast.block(0).up_weight.dtype == cast.head.dtype == torch.float32
    assert model.blocks[0].mlp.up.weight.dtype == torch.float8_e4m3fn


def test_weights_stored_in_8_bits_are_not_compiled_in():
    pipe = tiny_pipeline(dtype=torch.float32)
    calls = []
    pipe.transformer._compiled_step = lambda *_: calls.append(1)  # None: as where it has failed
    pipe(1, output_type="latent")
    assert len(calls) == N - 1
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    pipe(1, output_type="latent")
    assert len(calls) == N - 1
