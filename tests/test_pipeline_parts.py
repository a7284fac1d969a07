"""The pipeline's components: types and devices, and what half a pipeline can do."""

import numpy as np
import pytest
import torch

from spectralar import SpectralARPipeline
from tests.helpers import CLASS_NAMES, seed, tiny_pipeline

N = 12  # tokens of the tiny models, 16x16 images, 4 classes


def test_components():
    pipe = tiny_pipeline()
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


# Half a pipeline -----------------------------------------------------------------------------------------


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
