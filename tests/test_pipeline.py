"""What diffusers' own tests ask of a class-conditional pipeline, and our own: prefixes of tokens, codes of images."""

import inspect
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from spectralar import SpectralARPipeline
from spectralar.interface.image import to_model_input
from tests.helpers import (
    CLASS_NAMES,
    record_steps,
    seed,
    sharing_weights,
    tiny_pipeline,
    tiny_tokenizer,
    tiny_transformer,
)  # fmt: skip

N = 12  # tokens of the tiny models, 16x16 images, 4 classes


@pytest.fixture(scope="module")
def shared():
    return tiny_pipeline()


@pytest.fixture
def pipe(shared):
    """The same models all through; the pipeline's own state is new in each test."""
    return sharing_weights(shared)


@pytest.fixture
def steps(monkeypatch):
    return record_steps(monkeypatch)


# The call -------------------------------------------------------------------------------------------------


def test_signature_and_defaults():
    call = dict(inspect.signature(SpectralARPipeline.__call__).parameters)
    defaults = {name: p.default for name, p in call.items() if name not in ("self", "class_labels")}
    assert defaults == {
        "num_images_per_prompt": 1, "guidance_scale": 2.0, "guidance_schedule": "constant", "num_tokens": None,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "prefix_codes": None, "generator": None, "output_type": "pil",
        "return_dict": True, "callback_on_step_end": None, "callback_on_step_end_tensor_inputs": ("latents",),
    }  # fmt: skip
    stream = dict(inspect.signature(SpectralARPipeline.stream).parameters)
    assert stream.pop("every").default == 1
    call.pop("return_dict")
    assert list(stream.values()) == list(call.values())
    # `pipe([7], 4)` is a guidance scale of 4 in DiT: behind the labels all have to be named.
    kinds = [p.kind for name, p in call.items() if name not in ("self", "class_labels")]
    assert set(kinds) == {inspect.Parameter.KEYWORD_ONLY}


def test_dict_and_tuple_outputs(pipe):
    out = pipe([1, 3], generator=seed(), output_type="np")
    images, codes = pipe([1, 3], generator=seed(), output_type="np", return_dict=False)
    assert np.array_equal(out.images, images) and np.array_equal(out[0], images)
    assert torch.equal(out.codes, codes) and torch.equal(out["codes"], codes)
    assert codes.shape == (2, N) and codes.dtype == torch.int64


@pytest.mark.parametrize("channels", [1, 3])
def test_output_types(channels):
    pipe = tiny_pipeline(channels)
    out = {kind: pipe([1, 3], generator=seed(), output_type=kind) for kind in ("pt", "np", "pil", "latent")}
    pt, array, pil = (out[kind].images for kind in ("pt", "np", "pil"))
    assert pt.shape == (2, channels, 16, 16) and 0 <= pt.min() < pt.max() <= 1
    assert array.shape == (2, 16, 16, channels)
    assert np.allclose(array, pt.movedim(1, -1).numpy())
    assert [(image.mode, image.size) for image in pil] == [("L" if channels == 1 else "RGB", (16, 16))] * 2
    assert np.array_equal(np.stack(pil).reshape(array.shape), (array * 255).round())
    assert torch.equal(out["latent"].images, out["latent"].codes)
    assert torch.equal(out["latent"].codes, out["pt"].codes)


def test_images_are_the_decoded_codes(pipe):
    out = pipe([0, 1, 2], generator=seed(), output_type="pt")
    assert torch.equal(out.images, (pipe.tokenizer.decode(out.codes) / 2 + 0.5).clamp(0, 1))
    assert len(out.codes.unique()) > 8  # the tiny models are not degenerate
    assert out.images.std(dim=0).mean() > 0.01


def test_a_batch_is_its_images_one_by_one(pipe):
    labels = [2, 0, 3]
    batch = pipe(labels, generator=[seed(i) for i in range(3)], output_type="pt")
    for i, label in enumerate(labels):
        single = pipe(label, generator=seed(i), output_type="pt")
        assert torch.equal(single.codes[0], batch.codes[i])
        assert torch.allclose(single.images[0], batch.images[i], atol=1e-10)


def test_an_image_is_the_same_whatever_follows_it(pipe):
    one = pipe(2, generator=seed(), output_type="latent").codes
    assert torch.equal(pipe([2, 0, 1], generator=seed(), output_type="latent").codes[:1], one)
    assert torch.equal(pipe(2, num_images_per_prompt=5, generator=seed(), output_type="latent").codes[:1], one)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("images", [1, 2])
def test_num_images_per_prompt(pipe, labels, images):
    out = pipe([[1]] * labels, num_images_per_prompt=images, generator=seed(), output_type="np")
    assert out.images.shape == (labels * images, 16, 16, 1)


def test_images_of_a_label_are_side_by_side(pipe):
    expected = pipe([1, 1, 3, 3], generator=seed(), output_type="latent").codes
    assert torch.equal(pipe([1, 3], num_images_per_prompt=2, generator=seed(), output_type="latent").codes, expected)


def test_labels_of_every_kind(pipe):
    expected = pipe([1, 3, 1], generator=seed(), output_type="latent").codes
    names = ["sneaker", "Ankle Boot", "gym shoe"]
    for labels in (names, [[1, [3]], [1]], torch.tensor([1, 3, 1]), [1, "ankle boot", 1]):
        assert torch.equal(pipe(labels, generator=seed(), output_type="latent").codes, expected)
    assert pipe.get_label_ids("bag") == [2]
    assert pipe.labels["gym shoe"] == pipe.labels["Sneaker"] == 1
    assert pipe.class_names == ["T-shirt", "Sneaker", "Bag", "Ankle boot"]


def test_the_global_generator_serves_without_one(pipe):
    torch.manual_seed(5)
    first, second = (pipe(1, output_type="latent").codes for _ in range(2))
    assert torch.equal(first, pipe(1, generator=seed(5), output_type="latent").codes)
    assert not torch.equal(first, second)


def test_gradients_are_neither_needed_nor_switched_off_outside(pipe):
    stream = pipe.stream(1, output_type="pt")
    assert not next(stream).images.requires_grad
    assert torch.is_grad_enabled()
    assert not pipe(1, output_type="pt").images.requires_grad


# Sampling -------------------------------------------------------------------------------------------------


def test_scale_one_skips_the_unconditional_rows(pipe, steps):
    pipe([0, 1, 2, 3], guidance_scale=1.0)
    assert steps == [(4, 0)] + [(4, 1)] * (N - 1)
    assert not pipe.do_classifier_free_guidance
    steps.clear()
    pipe([0, 1, 2, 3], guidance_scale=2.0)
    assert steps == [(8, 0)] + [(8, 1)] * (N - 1)
    assert pipe.do_classifier_free_guidance


def test_guidance_and_its_schedule(pipe):
    def codes(**arguments):
        return pipe([0, 1, 2, 3] * 4, generator=seed(), output_type="latent", **arguments).codes

    off, on = codes(guidance_scale=1.0), codes(guidance_scale=6.0)
    rising = codes(guidance_scale=6.0, guidance_schedule="linear")
    assert not torch.equal(off, on) and not torch.equal(rising, on) and not torch.equal(rising, off)
    assert torch.equal(rising[:, 0], off[:, 0])  # the schedule starts at 1
    assert not torch.equal(on[:, 0], off[:, 0])


def test_temperature_and_filters(pipe):
    def codes(value, **arguments):
        return pipe([0, 1, 2, 3], generator=seed(value), output_type="latent", **arguments).codes

    greedy = codes(0, temperature=0.0)
    assert torch.equal(codes(1, temperature=0.0), greedy)
    assert torch.equal(codes(1, top_k=1), greedy) and torch.equal(codes(1, top_p=1e-9), greedy)
    assert not torch.equal(codes(1), greedy)
    assert not torch.equal(codes(1, top_k=3), codes(1))


def test_fewer_tokens_are_a_prefix(pipe):
    for schedule in ("constant", "cosine"):
        arguments = {"guidance_scale": 3.0, "guidance_schedule": schedule, "output_type": "pt"}
        whole = pipe([1, 2], generator=seed(), **arguments)
        for k in (1, 5):
            part = pipe([1, 2], generator=seed(), num_tokens=k, **arguments)
            assert torch.equal(part.codes, whole.codes[:, :k])
            assert torch.allclose(part.images, pipe.decode(whole.codes, k), atol=1e-10)
    assert not torch.allclose(part.images, whole.images, atol=0.01)


def test_prefix_codes_are_kept_and_continued(pipe, steps):
    whole = pipe([1, 2], generator=seed(), output_type="pt")
    for k in (0, 1, 7, N):
        steps.clear()
        out = pipe([1, 2], generator=seed(), prefix_codes=whole.codes[:, :k], output_type="pt")
        assert torch.equal(out.codes, whole.codes)
        assert torch.allclose(out.images, whole.images, atol=1e-10)
        assert [new for _, new in steps] == ([k] + [1] * (N - k - 1) if k < N else [])  # one pass over the prefix
        assert pipe.num_timesteps == N - k
    other = pipe([1, 2], generator=seed(9), prefix_codes=whole.codes[:, :7], output_type="latent").codes
    assert torch.equal(other[:, :7], whole.codes[:, :7]) and not torch.equal(other, whole.codes)
    part = pipe([1, 2], generator=seed(), prefix_codes=whole.codes[:, :3], num_tokens=6, output_type="latent").codes
    assert torch.equal(part, whole.codes[:, :6])


def test_prefix_rows_for_one_image_one_label_or_all(pipe):
    rows = torch.arange(8).view(4, 2)

    def starts(prefix):
        arguments = {"num_images_per_prompt": 2, "generator": seed(), "output_type": "latent"}
        return pipe([1, 2], prefix_codes=prefix, **arguments).codes[:, :2].tolist()

    assert starts(rows) == rows.tolist()
    assert starts(rows[:2]) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert starts(rows[:1]) == [[0, 1]] * 4
    assert starts([[4, 5]]) == starts(np.array([[4, 5]], np.int32)) == [[4, 5]] * 4


def test_nested_codebooks_are_respected():
    sizes = [2] * 6 + [32] * 6
    pipe = tiny_pipeline(tokenizer={"codebook_sizes": sizes})
    codes = pipe([0, 1, 2, 3], num_images_per_prompt=4, generator=seed(), output_type="latent").codes
    assert (codes < torch.tensor(sizes)).all() and codes.max() > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": None}, "guidance_scale must be a number, got None"),
        ({"guidance_scale": "2"}, "guidance_scale must be a number, got '2'"),
        ({"guidance_scale": 1e38}, "guidance_scale must be at most 1000"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a finite number"),
        ({"guidance_scale": True}, "guidance_scale must be a number, got True"),
        ({"guidance_scale": torch.tensor([2.0])}, "guidance_scale must be a number, got tensor"),
        ({"guidance_schedule": np.array([1, 2])}, "guidance_schedule must be one of"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_p": "1"}, "top_p must be a number, got '1'"),
        ({"top_p": 2j}, "top_p must be a number, got 2j"),
        ({"top_k": True}, "top_k must be an integer from 0 .off. .* got True"),
        ({"num_tokens": "8"}, "num_tokens must be an integer between 1 and 12, got '8'"),
        ({"num_tokens": True}, "num_tokens must be an integer between 1 and 12, got True"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt must be an integer of at least 1, got True"),
        ({"output_type": ["pil"]}, r"output_type must be one of pil, np, pt, latent, got \['pil'\]"),
        ({"generator": 0}, "generator must be a torch.Generator or a list of them, got 0"),
        ({"generator": [seed(), None], "class_labels": [0, 1]}, "generator must be .* got None"),
        ({"prefix_codes": torch.tensor([[1 + 1j]])}, "codes must be integers .* got a tensor of torch.complex64"),
        ({"prefix_codes": np.ma.masked_equal([[1, 2]], 1)}, "codes must be integers .* got a masked array"),
        ({"prefix_codes": [[True]]}, "codes must be integers between 0 and 31, got True"),
        ({"prefix_codes": [[10**30]]}, "prefix_codes must be a rectangular array of integers"),
        ({"callback_on_step_end": 5}, "callback_on_step_end must be a function, got 5"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list of names of .* got 'latents'"),
        ({"class_labels": np.ma.masked_equal([1, 2], 1)}, "class labels must be class ids or names"),
        ({"class_labels": b"bag"}, "class labels must be class ids or names, got b'bag'"),
        ({"class_labels": []}, "at least one class label"),
        ({"class_labels": 4}, "class ids must be between 0 and 3, got 4"),
        ({"class_labels": "sneakers"}, "did you mean 'Sneaker'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer of at least 1, got 0"),
        ({"num_images_per_prompt": 1.5}, "got 1.5"),
        ({"num_tokens": 0}, "num_tokens must be an integer between 1 and 12, got 0"),
        ({"num_tokens": 13}, "got 13"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent, got 'jpeg'"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_schedule": "square"}, "guidance_schedule must be one of constant, linear, cosine"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": 33}, "top_k must be an integer from 0 .off. to the codebook size 32"),
        ({"top_p": 0.0}, "top_p"),
        ({"generator": [seed(), seed()]}, "2 generators for 1 images"),
        ({"prefix_codes": [[1, 2], [3]]}, "prefix_codes must be a rectangular array of integers"),
        ({"prefix_codes": "abc"}, "prefix_codes must be a rectangular array of integers"),
        ({"prefix_codes": [1, 2]}, r"shape \(R, k\) with R of 1 and k of at most 12 tokens, got \(2,\)"),
        ({"prefix_codes": [[1], [2]]}, r"got \(2, 1\)"),
        ({"prefix_codes": [[1] * 13]}, r"got \(1, 13\)"),
        ({"prefix_codes": [[1, 2, 3]], "num_tokens": 2}, "at most 2 tokens"),
        ({"prefix_codes": [[32]]}, "codes must be integers between 0 and 31"),
        ({"prefix_codes": [[0.5]]}, "codes must be integers between 0 and 31"),
        ({"callback_on_step_end_tensor_inputs": ["embeds"]}, r"may name \['latents'\], not \['embeds'\]"),
    ],
)
def test_bad_arguments_are_told_at_once(pipe, steps, arguments, message):
    arguments = {"class_labels": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)
    with pytest.raises(ValueError, match=message):
        pipe.stream(**arguments)  # not at the first event
    assert not steps


def test_numbers_of_every_kind(pipe):
    def codes(labels=1, **arguments):
        return pipe(labels, generator=seed(), output_type="latent", **arguments).codes

    expected = codes(guidance_scale=2.0, temperature=0.5, top_p=0.5, top_k=7, num_tokens=5, num_images_per_prompt=2)
    for real in (np.float32, np.float16, np.float64, np.array, torch.tensor, Fraction):
        for integer in (np.int8, np.uint64, np.array, torch.tensor):
            arguments = {"guidance_scale": real(2.0), "temperature": real(0.5), "top_p": real(0.5)}
            arguments |= {"top_k": integer(7), "num_tokens": integer(5), "num_images_per_prompt": integer(2)}
            assert torch.equal(codes(**arguments), expected)
    assert torch.equal(codes(guidance_scale=np.int64(2)), codes(guidance_scale=torch.tensor(2, dtype=torch.int8)))
    assert torch.equal(codes(range(3)), codes([0, 1, 2]))
    assert torch.equal(codes(top_p=1e-300), codes(temperature=0))  # of the most likely tokens one at least


def test_prefix_codes_and_codes_of_every_kind(pipe):
    rows = [[1, 2, 3], [4, 5, 6]]
    frames = pipe.decode(rows)
    kinds = [
        [torch.tensor(row) for row in rows], [np.array(row, np.uint8) for row in rows], (range(1, 4), range(4, 7)),
        np.array(rows, ">i4"), np.array(rows[::-1])[::-1], np.array(rows, np.uint16), np.array(rows, object),
        torch.tensor(rows, dtype=torch.int8), [[np.int64(code) for code in row] for row in rows],
    ]  # fmt: skip
    for codes in kinds:
        assert torch.equal(pipe.decode(codes), frames)
        out = pipe([0, 1], prefix_codes=codes, output_type="latent").codes
        assert out[:, :3].tolist() == rows


def test_logits_that_are_not_finite_are_told():
    pipe = tiny_pipeline(dtype=torch.float32)
    pipe.transformer.head.weight.data[3, 0] = torch.nan
    for arguments in ({}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"guidance_scale": 1.0}):
        for call in (pipe, lambda *args, **arguments: list(pipe.stream(*args, **arguments))):
            with pytest.raises(ValueError, match="the logits are not finite, .* weights hold NaN or infinity"):
                call(1, output_type="latent", **arguments)


def test_images_that_are_not_finite_are_told():
    pipe = tiny_pipeline(dtype=torch.float32)
    pipe.tokenizer.to_pixels.weight.data[3, 0] = torch.inf
    for call in (lambda: pipe(1), lambda: list(pipe.stream(1)), lambda: pipe.decode([[1, 2]], output_type="np")):
        with pytest.raises(ValueError, match="the images are not finite: the tokenizer's weights hold NaN"):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_given_prefix_changes_nothing_in_half_precision(dtype):
    pipe = tiny_pipeline(dtype=dtype, transformer={"num_layers": 4})
    for scale in (1.0, 3.0):
        arguments = {"class_labels": [0, 1, 2, 3] * 12, "guidance_scale": scale, "output_type": "latent"}
        whole = pipe(generator=seed(), **arguments).codes
        for k in (1, 6, 11):
            assert torch.equal(pipe(generator=seed(), prefix_codes=whole[:, :k], **arguments).codes, whole)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_weights_stored_in_8_bits(compute):
    """As diffusers casts them at each use: the same as if they had been rounded to 8 bits beforehand."""
    for name in ("tokenizer", "transformer"):
        cast, rounded = tiny_pipeline(dtype=torch.float32), tiny_pipeline(dtype=torch.float32)
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


# Codes ----------------------------------------------------------------------------------------------------


def test_encode_takes_images_of_any_kind():
    for channels in (1, 3):
        pipe = tiny_pipeline(channels)
        pixels = np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8)
        image = Image.fromarray(pixels)
        images = [image, image.convert("CMYK"), pixels / 255, torch.rand(1, 16, 16)]
        codes = pipe.encode(images)
        assert codes.shape == (4, N) and codes.dtype == torch.int64
        assert torch.equal(codes, pipe.tokenizer.encode(to_model_input(images, 16, channels).double()))
        assert torch.equal(pipe.encode(images[0]), codes[:1])
        assert not torch.equal(codes[0], codes[3])
    with pytest.raises(ValueError, match="lie in"):
        pipe.encode(torch.full((1, 3, 16, 16), 2.0))


@pytest.mark.parametrize("channels", [1, 3])
def test_decode_shapes_and_types(channels):
    pipe = tiny_pipeline(channels)
    codes = torch.randint(0, 32, (3, N))
    raw = pipe.tokenizer.decode(codes, [1, 5, N]).detach()  # (B, S, C, H, H)
    raw = (raw / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(pipe.decode(codes), raw[:, 2], atol=1e-10)
    assert torch.allclose(pipe.decode(codes, 5), raw[:, 1], atol=1e-10)
    per_image = pipe.decode(codes, torch.tensor([1, 5, N]))
    assert torch.allclose(per_image, raw[torch.arange(3), torch.arange(3)], atol=1e-10)
    frames = pipe.decode(codes.tolist(), [1, 5, N])
    assert torch.equal(frames, raw) and frames.shape == (3, 3, channels, 16, 16)
    array = pipe.decode(codes, [1, 5, N], output_type="np")
    assert np.allclose(array, raw.movedim(2, -1)) and array.shape == (3, 3, 16, 16, channels)
    pil = pipe.decode(codes, [1, 5], output_type="pil")
    assert [len(row) for row in pil] == [2, 2, 2]
    assert np.array_equal(np.array(pil[2][1]).reshape(16, 16, -1), (array[2, 1] * 255).round())
    assert [image.mode for image in pipe.decode(codes, output_type="pil")] == ["L" if channels == 1 else "RGB"] * 3


def test_decode_clamps_and_the_tokenizer_does_not():
    pipe = tiny_pipeline()
    pipe.tokenizer.to_pixels.weight.data.mul_(10)
    codes = torch.randint(0, 32, (64, N))
    raw = pipe.tokenizer.decode(codes)
    assert raw.abs().max() > 1
    assert pipe.decode(codes).min() == 0 and pipe.decode(codes).max() == 1


@pytest.mark.parametrize(
    ("codes", "arguments", "message"),
    [
        ([[32]], {}, "between 0 and 31"),
        ([[-1]], {}, "between 0 and 31"),
        ([1, 2], {}, r"shape \(B, n\)"),
        ([[1], [2, 3]], {}, "codes must be a rectangular array of integers"),
        ([[1, 2]], {"num_tokens": 3}, "between 1 and 2, got 3"),
        ([[1, 2]], {"num_tokens": [1, 0]}, "between 1 and 2, got 0"),
        ([[1, 2]], {"output_type": "latent"}, "output_type must be one of pil, np, pt, got 'latent'"),
    ],
)
def test_bad_codes_are_told(pipe, codes, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.decode(codes, **arguments)


# Housekeeping ---------------------------------------------------------------------------------------------


def test_components(pipe):
    assert pipe.components == {"tokenizer": pipe.tokenizer, "transformer": pipe.transformer}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_to_dtype(dtype):
    pipe = tiny_pipeline().to(dtype)
    assert {model.dtype for model in pipe.components.values()} == {dtype} and pipe.dtype == dtype
    out = pipe([0, 1, 2, 3], generator=seed(), output_type="pt")
    assert out.images.dtype == dtype and out.images.isfinite().all() and out.codes.shape == (4, N)
    double = tiny_pipeline()
    assert (out.images.double() - double.decode(out.codes)).abs().max() < 0.05
    assert pipe(0, output_type="np").images.dtype == np.float32  # numpy has no bfloat16
    assert len(list(pipe.stream(0, every=6))) == 2
    # The same images give nearly the same codes in each type.
    x = torch.rand(16, 1, 16, 16, generator=seed())
    assert (pipe.encode(x) == double.encode(x)).double().mean() > 0.9


def test_to_device():
    pipe = tiny_pipeline().to("meta")
    assert {model.device.type for model in pipe.components.values()} == {"meta"}
    assert tiny_pipeline().to("cpu").device.type == "cpu"


def test_progress_bar(pipe, capsys):
    pipe.set_progress_bar_config()
    pipe(1)
    assert f"{N}/{N}" in capsys.readouterr().err
    list(pipe.stream(1, prefix_codes=[[1, 2]]))
    assert f"{N - 2}/{N - 2}" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(1)
    assert capsys.readouterr().err == ""


def test_attention_slicing_switch_is_harmless(pipe):
    codes = pipe(1, generator=seed(), output_type="latent").codes
    pipe.enable_attention_slicing()
    assert torch.equal(pipe(1, generator=seed(), output_type="latent").codes, codes)


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
    assert onloaded == ["ar"] * 6 + ["tok"] + ["ar"] * 6 + ["tok"]
    onloaded.clear()
    assert torch.equal(pipe.encode(pipe.decode(out.codes)), tiny_pipeline().encode(expected.images))
    assert onloaded == ["tok", "tok"]


def test_offloading_by_submodules_is_refused(pipe):
    with pytest.raises(NotImplementedError, match="use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()
    with pytest.raises(ValueError, match="SpectralTokenizer does not support group offloading"):
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def test_models_must_fit_each_other():
    with pytest.raises(ValueError, match="codebook_size is 32 in the tokenizer and 16 in the transformer"):
        SpectralARPipeline(tiny_tokenizer(), tiny_transformer(codebook_size=16))
    with pytest.raises(ValueError, match="num_tokens is 12 in the tokenizer and 8 in the transformer"):
        SpectralARPipeline(tiny_tokenizer(), tiny_transformer(num_tokens=8))
    with pytest.raises(ValueError, match="the tokenizer must be a SpectralTokenizer, got SpectralARTransformer"):
        SpectralARPipeline(tiny_transformer(), tiny_tokenizer())  # in DiT's order


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({4: "cat"}, "id2label does not fit the model: class ids must be between 0 and 3, got 4"),
        (["cat", "dog"], r"id2label must be a dict of class ids and names, got \['cat', 'dog'\]"),
        ({"cat": 0}, "id2label must be a dict of class ids and names, got {'cat': 0}"),
        ({0: None}, "id2label must be a dict of class ids and names, got {0: None}"),
        ({True: "cat"}, "id2label must be a dict of class ids and names, got {True: 'cat'}"),
    ],
)
def test_names_that_are_none_are_told(id2label, message):
    with pytest.raises(ValueError, match=message):
        SpectralARPipeline(tiny_tokenizer(), tiny_transformer(), id2label=id2label)


def test_models_set_later_must_fit_too():
    pipe = tiny_pipeline()
    for transformer, message in (
        (tiny_transformer(num_classes=3), "id2label does not fit the model: class ids must be between 0 and 2, got 3"),
        (tiny_transformer(codebook_size=16), "codebook_size is 32 in the tokenizer and 16 in the transformer"),
        (tiny_transformer(num_tokens=8), "num_tokens is 12 in the tokenizer and 8 in the transformer"),
        (torch.nn.Linear(2, 2), "the transformer must be a SpectralARTransformer, got Linear"),
    ):
        pipe.transformer = transformer
        for call in (pipe, pipe.stream):
            with pytest.raises(ValueError, match=message):
                call(1, output_type="latent")
    pipe.transformer = tiny_transformer(num_classes=6).double()  # the names are of some of its classes
    assert pipe(["bag", 5], output_type="latent").codes.shape == (2, N)
    assert pipe.class_names[4:] == ["4", "5"]


def test_names_may_be_added():
    pipe = tiny_pipeline()
    pipe.labels["Boat"] = 3
    pipe.labels["Bag"] = 0
    assert pipe.get_label_ids(["boat", "Boat", "Bag", "sneaker"]) == [3, 3, 0, 1]
    pipe.labels["Boat"] = 4
    with pytest.raises(ValueError, match="between 0 and 3, got 4"):
        pipe("boat")
    del pipe.labels["Boat"]
    with pytest.raises(ValueError, match="no class is named 'boat'"):
        pipe("boat")


# Half a pipeline ------------------------------------------------------------------------------------------


def test_without_a_tokenizer_there_are_codes():
    whole = tiny_pipeline()
    pipe = SpectralARPipeline(None, whole.transformer, CLASS_NAMES)
    pipe.set_progress_bar_config(disable=True)
    codes = whole("bag", generator=seed(), output_type="latent").codes
    assert torch.equal(pipe("bag", generator=seed(), output_type="latent").images, codes)
    arguments = {"prefix_codes": codes[:, :3], "generator": seed(), "every": 4, "output_type": "latent"}
    assert [event.index for event in pipe.stream("bag", **arguments)] == [3, 4, 8, 12]
    for call, message in (
        (lambda: pipe("bag"), "no tokenizer, so output_type can only be 'latent', got 'pil'"),
        (lambda: pipe.stream("bag", output_type="pt"), "no tokenizer, so output_type"),
        (lambda: pipe.encode(torch.rand(1, 1, 16, 16)), "no tokenizer: it generates codes and encodes no images"),
        (lambda: pipe.decode(codes), "no tokenizer: it generates codes and decodes no codes"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_without_a_transformer_there_are_no_new_codes():
    whole = tiny_pipeline()
    pipe = SpectralARPipeline(whole.tokenizer, None, CLASS_NAMES)
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(pipe.decode(pipe.encode(x), [1, N]), whole.decode(whole.encode(x), [1, N]))
    assert pipe.labels == whole.labels
    for call in (pipe, pipe.stream):
        with pytest.raises(ValueError, match="no transformer: it encodes and decodes, and cannot generate"):
            call("bag")
