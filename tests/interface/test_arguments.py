"""Arguments of every kind that people have, and one sentence about those that are none."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from spectralar import SpectralARPipeline, SpectralARTransformer
from tests.helpers import seed, tiny_pipeline, tiny_tokenizer, tiny_transformer

N = 12  # tokens of the tiny models, 16x16 images, 4 classes
HOLDS_ITSELF = [1]
HOLDS_ITSELF.append(HOLDS_ITSELF)
CODES = torch.tensor([[1, 2], [3, 4]])
ODD = {  # tensors whose numbers are not to be read as those of others
    "meta": CODES.to("meta"),
    "sparse": CODES.to_sparse(),
    "nested": torch.nested.nested_tensor([CODES[0], CODES[1]]),
    "quantized": torch.quantize_per_tensor(CODES.float(), 1, 0, torch.quint8),
}


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
        ({"class_labels": np.ma.masked_equal([1, 2], 3)}, "class labels must be class ids or names, got masked_array"),
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
        ({"prefix_codes": "abc"}, "prefix_codes must be integers between 0 and 31, got 'abc'"),
        ({"prefix_codes": [b"12"]}, "prefix_codes must be integers between 0 and 31, got b'12'"),
        ({"prefix_codes": [memoryview(b"12")]}, "prefix_codes must be integers between 0 and 31, got <memory"),
        ({"prefix_codes": HOLDS_ITSELF}, "prefix_codes must be integers .* got a list that holds itself"),
        ({"class_labels": HOLDS_ITSELF}, "class labels must not be in a list that holds itself"),
        ({"guidance_scale": torch.tensor(2.0).to_sparse()}, "guidance_scale must be a number, got tensor"),
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


@pytest.mark.parametrize("kind", ODD)
def test_tensors_whose_numbers_cannot_be_read_are_told(pipe, kind):
    codes, pixels = ODD[kind], torch.rand(2, 1, 16, 16)
    images = {"meta": pixels.to("meta"), "sparse": pixels.to_sparse()}
    images["nested"] = torch.nested.nested_tensor([pixels[0], pixels[1]])
    images["quantized"] = torch.quantize_per_tensor(pixels, 1 / 255, 0, torch.quint8)
    for call, message in (
        (lambda: pipe([0, 1], prefix_codes=codes), f"prefix_codes must be integers .* got a {kind} tensor"),
        (lambda: pipe([0, 1], callback_on_step_end=lambda *_: {"latents": codes}), f"latents .* got a {kind} tensor"),
        (lambda: pipe.decode(codes), f"codes must be integers .* got a {kind} tensor"),
        (lambda: pipe.tokenizer.decode(codes), "codes must"),
        (lambda: pipe(codes), "class labels must be class ids or names"),
        (lambda: pipe.encode(images[kind]), f"torch images must be ordinary tensors, got a {kind} one"),
        (lambda: pipe.tokenizer.encode(images[kind]), f"images must be an ordinary tensor, got a {kind} one"),
        (lambda: pipe.decode(CODES, codes), "num_tokens as a tensor must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


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


# Models and names ----------------------------------------------------------------------------------------


def test_models_must_fit_each_other():
    with pytest.raises(ValueError, match="codebook_size is 32 in the tokenizer and 16 in the transformer"):
        SpectralARPipeline(tiny_tokenizer(), tiny_transformer(codebook_size=16))
    with pytest.raises(ValueError, match="num_tokens is 12 in the tokenizer and 8 in the transformer"):
        SpectralARPipeline(tiny_tokenizer(), tiny_transformer(num_tokens=8))
    with pytest.raises(ValueError, match="the tokenizer must be a SpectralTokenizer, got SpectralARTransformer"):
        SpectralARPipeline(tiny_transformer(), tiny_tokenizer())  # in DiT's order


def test_models_set_later_must_fit_too():
    pipe = tiny_pipeline()
    for transformer, message in (
        (tiny_transformer(num_classes=3), "id2label does not fit the model: class ids must be between 0 and 2, got 3"),
        (tiny_transformer(codebook_size=16), "codebook_size is 32 in the tokenizer and 16 in the transformer"),
        (tiny_transformer(num_tokens=8), "num_tokens is 12 in the tokenizer and 8 in the transformer"),
        (torch.nn.Linear(2, 2), "the transformer must be a SpectralARTransformer, got Linear"),
        (SpectralARTransformer, "the transformer must be a SpectralARTransformer, got type"),
    ):
        pipe.transformer = transformer
        for call in (pipe, pipe.stream):
            with pytest.raises(ValueError, match=message):
                call(1, output_type="latent")
    pipe.transformer = tiny_transformer(num_classes=6).double()  # the names are of some of its classes
    assert pipe(["bag", 5], output_type="latent").codes.shape == (2, N)
    assert pipe.class_names[4:] == ["4", "5"]
    for name, model, message in (
        ("tokenizer", pipe.transformer, "the tokenizer must be a SpectralTokenizer, got SpectralARTransformer"),
        ("transformer", torch.nn.Linear(2, 2), "the transformer must be a SpectralARTransformer, got Linear"),
    ):
        pipe = tiny_pipeline()
        setattr(pipe, name, model)
        for call in (lambda pipe: pipe.encode(torch.rand(1, 1, 16, 16)), lambda pipe: pipe.decode([[1]])):
            with pytest.raises(ValueError, match=message):
                call(pipe)
    pipe = tiny_pipeline()
    pipe.transformer.to("meta")  # whoever only encodes may want its memory
    assert pipe.encode(torch.rand(1, 1, 16, 16)).shape == (1, N)


def test_models_that_cannot_compute_are_told():
    for change, message in (
        (lambda model: model.to("meta"), "is on the meta device, where it has no weights"),
        (lambda model: torch.nn.Module.to(model, torch.float8_e4m3fn), "is in torch.float8_e4m3fn, in which nothing"),
    ):
        for name, calls in (("transformer", ("request", "stream")), ("tokenizer", ("encode", "decode", "stream"))):
            pipe = tiny_pipeline(dtype=torch.float32)
            change(getattr(pipe, name))
            given = {"encode": torch.rand(1, 1, 16, 16), "decode": [[1]]}
            for call in calls:
                with pytest.raises(ValueError, match=f"the {name} {message}"):
                    getattr(pipe, call)(given.get(call, 0))


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


def test_names_may_be_added():
    pipe = tiny_pipeline()
    pipe.labels["Boat"] = 3
    pipe.labels["Bag"] = 0
    assert pipe.get_label_ids(["boat", "Boat", "Bag", "sneaker"]) == [3, 3, 0, 1]
    pipe.labels["Boat"] = 4
    with pytest.raises(ValueError, match="between 0 and 3, got 4"):
        pipe("boat")
    del pipe.labels["Boat"]
    pipe.labels[3] = 3  # whatever that may be
    with pytest.raises(ValueError, match="no class is named 'boat'"):
        pipe("boat")
