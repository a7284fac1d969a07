import contextlib
import inspect
import sys
from copy import copy
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from spectralar.demo import model as module
from spectralar.demo.model import Model, best_device, check_device, to_pixels
from spectralar.demo.page import build
from spectralar.demo.start import find_models
from spectralar.interface.outputs import to_output
from tests.demo.conftest import tiny_model
from tests.helpers import tiny_pipeline


def test_models_are_found_and_loaded(model, tmp_path):
    model.pipe.save_pretrained(tmp_path / "b")
    model.pipe.save_pretrained(tmp_path / "a")
    (tmp_path / "c").mkdir()
    assert [path.name for path in find_models(tmp_path)] == ["a", "b"]
    loaded = Model.load(tmp_path / "b", "cpu")
    assert loaded.name == "b" and loaded.source == (tmp_path / "b").as_posix()
    assert loaded.cutoffs == model.cutoffs and loaded.class_names == ["T-shirt", "Sneaker", "Bag", "Ankle boot"]


def test_device_is_one_that_is_there():
    assert torch.empty(1, device=best_device()).device.type == best_device()


def test_labels_by_name_or_id(model):
    assert model.label("gym shoe") == 1 and model.label("3") == 3
    with pytest.raises(ValueError, match="no class is named 'sock'"):
        model.label("sock")


def test_a_search_finds_all_names_of_a_class():
    pipe = tiny_pipeline(dtype=torch.float32, id2label={0: "goldfish, Carassius auratus", 1: "bus", 3: "tree, oak"})
    model = Model("tiny", pipe, "models/tiny")
    assert model.class_names == ["goldfish", "bus", "2", "tree"]
    assert model.all_names == ["goldfish, Carassius auratus", "bus", "2", "tree, oak"]
    dropdowns = [block for block in build(model).blocks.values() if isinstance(block, gr.Dropdown)]
    of_classes = [dropdown for dropdown in dropdowns if dropdown.label in ("Class", "or a sample of")]
    assert len(of_classes) == 6  # of Generate, Reconstruct, Frequency bands, and three of Remix
    assert all([text for text, _ in dropdown.choices] == model.all_names for dropdown in of_classes)
    assert all(dropdown.choices[3] == ("tree, oak", 3) for dropdown in of_classes)  # chosen by id


def test_pixels_are_the_pipelines_own():
    x = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    images = to_output(x * 2 - 1, "pil")
    np.testing.assert_array_equal(to_pixels((x * 2 - 1) / 2 + 0.5), np.stack([np.asarray(image) for image in images]))


def test_decode_prefixes_are_nested(model):
    codes = model.encode(torch.zeros(1, 1, 16, 16))[0]
    frames = model.decode_prefixes(codes)
    assert frames.shape == (12, 1, 16, 16)
    np.testing.assert_array_equal(model.decode([codes], [3])[0][0], to_pixels((frames[2] / 2 + 0.5).clamp(0, 1)))


def test_samples_run_side_by_side(model):
    """Two visitors at once get what each would get alone."""

    def last(frames):
        return [frame for frame in frames if frame][-1].codes

    alone = [last(model._frames(label, 1, seed=5)) for label in (0, 2)]
    first, second = model._frames(0, 1, seed=5), model._frames(2, 1, seed=5, guidance_scale=2.0)
    begun = [next(first), next(second)]
    assert [last([frame, *frames]) for frame, frames in zip(begun, (first, second), strict=True)] == alone


@pytest.mark.parametrize("prefix", [None, [[3, 4, 5]]])
def test_with_and_without_an_engine_it_is_the_same(model, monkeypatch, prefix):
    arguments = {"guidance_scale": 3.0, "prefix_codes": prefix}
    frames, last = [f for f in model._frames(1, 2, 5, **arguments) if f], model._last(1, 2, 5, **arguments)
    monkeypatch.setattr(model, "engine", None)
    plain = [f for f in model._frames(1, 2, 5, **arguments) if f]
    assert [(f.k, f.codes, f.sampled) for f in frames] == [(f.k, f.codes, f.sampled) for f in plain]
    for ours, theirs in zip((f.images for f in frames), (f.images for f in plain), strict=True):
        np.testing.assert_allclose(ours.astype(int), theirs.astype(int), atol=1)
    codes, images = model._last(1, 2, 5, **arguments)
    assert last[0] == codes == frames[-1].codes
    for pixels in (last[1], frames[-1].images):
        np.testing.assert_allclose(images.astype(int), pixels.astype(int), atol=1)


def test_models_on_a_cpu_sample_in_a_process_of_their_own_where_there_is_a_core_for_it(model, monkeypatch):
    made = []

    class EngineProcess:
        def __init__(self, models, workers):
            made.append((models, workers))
            self.engines = [f"engine {i}" for i in range(len(models))]

    monkeypatch.setattr(module, "EngineProcess", EngineProcess)
    on_cpu, lent, elsewhere = (copy(model) for _ in range(3))
    lent.engine = None  # ZeroGPU
    elsewhere.pipe = SimpleNamespace(device=torch.device("cuda"))
    module.sample_apart([lent])
    monkeypatch.setattr(module, "usable_cpus", lambda: 1)
    module.sample_apart([on_cpu])
    assert not made and on_cpu.engine is model.engine
    monkeypatch.setattr(module, "usable_cpus", lambda: 3)
    module.sample_apart([lent, on_cpu, elsewhere])
    assert made == [([(model.pipe.transformer, model.pipe.tokenizer)], 3)]
    assert (lent.engine, on_cpu.engine, elsewhere.engine) == (None, "engine 0", model.engine)


class ZeroGPU:
    """Stands in for Hugging Face's package `spaces`: lends a GPU for the calls of a function."""

    def __init__(self):
        self.lent = 0

    def GPU(self, duration):  # noqa: N802
        def decorated(function):
            def call(*arguments, **options):
                with self.held():
                    return function(*arguments, **options)

            def generate(*arguments, **options):
                steps = iter(function(*arguments, **options))
                while True:
                    with self.held():
                        try:
                            step = next(steps)
                        except StopIteration:
                            return
                    yield step

            return generate if inspect.isgeneratorfunction(function) else call

        return decorated

    @contextlib.contextmanager
    def held(self):
        self.lent += 1
        try:
            yield
        finally:
            self.lent -= 1


def test_on_zero_gpu_nothing_is_computed_without_the_gpu(monkeypatch):
    spaces = ZeroGPU()
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    model = tiny_model()
    calls = []

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*arguments, **options):
            calls.append((name, spaces.lent > 0))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(model.pipe.tokenizer, "encode")
    watch(model.pipe.tokenizer, "decode")
    watch(model.pipe.transformer, "step")
    demo = build(model)
    public = {fn.api_name: fn.fn for fn in demo.fns.values() if fn.api_visibility == "public"}
    photo = Image.new("RGB", (20, 20), "red")
    arguments = {
        "generate": ("Bag",), "generate_sheet": ("Bag", 1, 0, 2.0, 4), "reconstruct": (photo, 3),
        "decode": ([[1, 2]],), "bands": (photo,), "band_figure": (photo, "contributions", "csv"), "influence": (),
        "mix": (photo, photo, 3), "continue_as": (photo, "Bag", 3, 1, 0, 2.0), "model": (),
    }  # fmt: skip
    assert set(arguments) == set(public)
    for name, values in arguments.items():
        public[name](*values)
    assert {name for name, _ in calls} == {"encode", "decode", "step"}
    assert all(lent for _, lent in calls), [name for name, lent in calls if not lent]


def test_a_device_that_is_not_there_is_named():
    check_device(None)
    check_device("cpu")
    with pytest.raises(ValueError, match="--device tpu3 is not there: torch finds"):
        check_device("tpu3")


def test_the_package_spaces_itself_lets_the_page_be_elsewhere(model):
    """Outside of ZeroGPU it must change nothing; on it, it forks, which no test can have without one."""
    spaces = pytest.importorskip("spaces")
    seen = []
    assert list(spaces.GPU(duration=60)(lambda: iter([1, 2]))()) == [1, 2]
    for frame in Model("tiny", model.pipe, "models/tiny").frames(0, 1, 0):
        seen.append(frame)
    assert [frame.k for frame in seen if frame][-1] == model.num_tokens
