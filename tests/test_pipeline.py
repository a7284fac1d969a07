"""What diffusers' own tests ask of a class-conditional pipeline, and our own: prefixes of tokens."""

import inspect

import numpy as np
import pytest
import torch

from spectralar import SpectralARPipeline
from tests.helpers import seed, tiny_pipeline

N = 12  # tokens of the tiny models, 16x16 images, 4 classes


# The call ------------------------------------------------------------------------------------------------


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


# Sampling ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_given_prefix_changes_nothing_in_half_precision(dtype):
    pipe = tiny_pipeline(dtype=dtype, transformer={"num_layers": 4})
    for scale in (1.0, 3.0):
        arguments = {"class_labels": [0, 1, 2, 3] * 12, "guidance_scale": scale, "output_type": "latent"}
        whole = pipe(generator=seed(), **arguments).codes
        for k in (1, 6, 11):
            assert torch.equal(pipe(generator=seed(), prefix_codes=whole[:, :k], **arguments).codes, whole)


def test_nested_codebooks_are_respected():
    sizes = [2] * 6 + [32] * 6
    pipe = tiny_pipeline(tokenizer={"codebook_sizes": sizes})
    codes = pipe([0, 1, 2, 3], num_images_per_prompt=4, generator=seed(), output_type="latent").codes
    assert (codes < torch.tensor(sizes)).all() and codes.max() > 2


def test_sampling_drops_nothing_while_the_model_is_in_training():
    pipe = tiny_pipeline(transformer={"dropout": 0.5})
    arguments = {"class_labels": [0, 1, 2, 3], "output_type": "latent"}
    whole = pipe(generator=seed(), **arguments).codes
    pipe.transformer.train()
    for k in (0, 1, 7):
        assert torch.equal(pipe(generator=seed(), prefix_codes=whole[:, :k], **arguments).codes, whole)
    assert pipe.transformer.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_around_a_call_changes_no_code(dtype):
    pipe = tiny_pipeline(dtype=torch.float32)
    arguments = {"class_labels": [0, 1, 2, 3] * 4, "output_type": "pt"}
    whole = pipe(generator=seed(), **arguments)
    with torch.autocast("cpu", dtype=dtype):
        outs = [pipe(generator=seed(), prefix_codes=whole.codes[:, :k], **arguments) for k in (0, 5)]
        *_, last = pipe.stream(generator=seed(), **arguments)
        assert torch.is_autocast_enabled("cpu")
    for out in (*outs, last):
        assert torch.equal(out.codes, whole.codes) and (out.images.float() - whole.images).abs().max() < 0.05


def test_logits_that_are_not_finite_are_told():
    pipe = tiny_pipeline(dtype=torch.float32)
    pipe.transformer.head.weight.data[3, 0] = torch.nan
    for arguments in ({}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"guidance_scale": 1.0}):
        for call in (pipe, lambda *args, **arguments: list(pipe.stream(*args, **arguments))):
            with pytest.raises(ValueError, match="the logits are not finite, .* weights hold NaN or infinity"):
                call(1, output_type="latent", **arguments)
