"""Several sources in one run: which images a step takes, and whole runs of the tokenizer."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.data.test_streams import BATCH_SIZE, cfg, greys, reads, wait_until  # noqa: F401
from tests.train.run_folders import assert_same_run, assert_same_up_to_rounding, logged, metrics, stop_at
from train.configs.config import DataConfig, MixedSource
from train.configs.reading import load_config
from train.data.images import ImageSet, load_images
from train.data.mixing import MixedImages, load_mixed


def images_of(*values: int) -> ImageSet:
    """Images 2x2, each of one grey level."""
    pixels = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return ImageSet(pixels, torch.zeros(len(values), dtype=torch.long), ["a"], 0)


def a_mixture() -> tuple[list[ImageSet], MixedImages]:
    sources = [images_of(*range(20)), images_of(*range(100, 130)), images_of(*range(200, 209))]
    return sources, MixedImages(sources, lambda batch: [batch // 2, batch // 4, batch // 4])


def steps(data: MixedImages, numbers: range, batch: int = 8, seed: int = 0) -> list[list[int]]:
    """The grey levels of the images of each step."""
    return [greys(data.gather(data.step_indices(batch, seed, number))) for number in numbers]


# ------------------------------------------------------------------------------------------------ which images


def test_each_step_has_each_source_s_share_and_each_source_epochs_of_its_own():
    sources, data = a_mixture()
    taken = steps(data, range(20))
    assert all(Counter(grey // 100 for grey in step) == {0: 4, 1: 2, 2: 2} for step in taken)
    for number, (source, count) in enumerate(zip(sources, (4, 2, 2), strict=True)):
        own = [grey for step in taken for grey in step if grey // 100 == number]
        # As if it were alone with batches of so many.
        assert own == [grey for i in range(20) for grey in greys(source.images[source.step_indices(count, 0, i)])]
    assert {grey for step in taken[:5] for grey in step if grey < 100} == set(range(20))  # an epoch of the first


def test_a_step_is_a_function_of_seed_and_step_alone():
    expected = steps(a_mixture()[1], range(30))
    data = a_mixture()[1]
    for number in (29, 3, 0, 12, 11):
        assert steps(data, range(number, number + 1)) == expected[number : number + 1]
    assert steps(data, range(3), seed=1) != expected[:3]


def test_every_slice_of_a_step_has_all_sources():
    for step in steps(a_mixture()[1], range(4), batch=16):
        for slices in (2, 4):
            parts = np.array(step).reshape(slices, -1) // 100
            assert all(Counter(part) == {0: 8 // slices, 1: 4 // slices, 2: 4 // slices} for part in parts.tolist())


def test_gathered_images_are_a_copy():
    sources, data = a_mixture()
    chosen = torch.tensor([0, 20, 49, 50, 58, 0])
    batch = data.gather(chosen)
    assert greys(batch) == [0, 100, 129, 200, 208, 0] and batch.shape == (6, 1, 2, 2)
    batch.zero_()
    assert greys(data.gather(chosen)) == [0, 100, 129, 200, 208, 0]
    assert len(data) == 59


def test_streams_are_mixed_as_well(cfg, reads):  # noqa: F811
    """The first source is streamed, and read ahead by its own part of a step."""
    streamed, other = load_images(cfg, "train"), images_of(*range(200, 250))
    other.images = other.images[:, :, :1, :1].expand(-1, *streamed.images.shape[1:])
    data = MixedImages([streamed, other], lambda batch: [batch - 2, 2])
    for number in (3, 4, 0):
        data.expect(BATCH_SIZE, 0, number)
        chosen = data.step_indices(BATCH_SIZE, 0, number)
        held = streamed.images._held
        wait_until(lambda held=held: all(future.done() for future in held.values()))
        count = len(reads)
        found = greys(data.gather(chosen))
        assert len(reads) == count  # all of it was there
        alone = load_images(cfg, "train")
        expected = alone.images[alone.step_indices(BATCH_SIZE - 2, 0, number)]
        assert [grey for grey in found if grey < 200] == greys(expected)


# ------------------------------------------------------------------------------------------------ settings


def test_settings_of_a_source_are_those_of_the_data_but_its_own():
    preset = "tiny-imagenet-64"
    config = load_config(preset, ["data.mix.photos.source=a b", "data.mix.photos.eval_split=no", "data.limit=3"])
    (other,) = config.data.mixed().values()
    expected = load_config(preset, ["data.limit=3", "data.eval_split=no"]).data
    expected.source = "a b"
    assert other == expected
    assert config.data.images_a_step(10) == [5, 5]
    assert load_config(preset, ["data.mix.photos.source=a", "data.mix.photos.share=0.3"]).data.images_a_step(32) == [
        22, 10
    ]  # fmt: skip
    off = load_config(preset, ["data.mix.photos.source=a", "data.mix.photos.share=0"]).data
    assert (off.mixed(), off.images_a_step(7)) == ({}, [7])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("data.mix.photos.share=0.3", "data.mix.photos.source is not set"),
        ("data.mix.photos.source=x data.mix.photos.share=1", "share must be 0 or more and below 1, not 1"),
        ("data.mix.photos.source=x data.mix.photos.share=nan", "share must be 0 or more and below 1, not nan"),
        ("data.mix.a.source=x data.mix.a.share=0.01", "32, 0 would come from data.source, a"),
        ("data.mix.a.source=x data.mix.b.source=x", "16, 16 would come from data.source, a, b"),
        ("data.mix.a.sauce=x", "did you mean data.mix.NAME.source or data.source?"),
        ("data.mix=x", "set one of data.mix.NAME.source, "),
        ("data.mix.a/b.source=x", "data.mix.a/b: a source is named by letters"),
    ],
)
def test_wrong_settings_of_sources_are_one_sentence(overrides, named):
    with pytest.raises(ValueError) as caught:
        load_config("fashion-mnist-32", overrides.split())
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "test" / "a").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "train" / "a" / "0.png")
    data = DataConfig(source=str(tmp_path), image_size=8, mix={"photos": MixedSource(source=str(tmp_path / "gone"))})
    with pytest.raises(ValueError, match="^data.mix.photos: .*gone' does not exist"):
        load_mixed(data, "train")


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Settings that mix plain greys, with split names of their own, into the waves: a quarter of each step."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for split, count in (("learn", 20), ("check", 6)):
        (folder / split / "any").mkdir(parents=True)
        for i in range(count):
            Image.new("L", (16, 16), int(random.integers(118, 138))).save(folder / split / "any" / f"{i}.png")
    settings = {"source": folder, "share": 0.25, "train_split": "learn", "eval_split": "check"}
    return [f"data.mix.photos.{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def reference(scripts, preset, photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference")
    code, text = scripts.run("train_tokenizer", [preset, "--output", output, *photos])
    assert code == 0, text
    assert "6 images a step from data.source: 54 images, 27 in each of 2 classes." in text
    assert "2 images a step from photos: 20 images of one class." in text
    return output


def test_held_out_figures_are_of_each_source_apart(reference):
    (last,) = [line for line in metrics(reference, "tokenizer") if "lr" not in line]
    own = {name.removeprefix("eval/photos/") for name in last if name.startswith("eval/photos/")}
    assert own == {name.removeprefix("eval/") for name in last if "photos" not in name} - {"step"}
    assert last["eval/photos/psnr_4"] > last["eval/psnr_4"] + 3  # plain greys are easier than waves
    names = {path.name for path in (reference / "train_tokenizer" / "samples").iterdir()}
    assert names == {"reconstruction-0000024.png", "reconstruction-photos-0000024.png"}


def test_what_is_mixed_in_is_learnt_from(scripts, preset, reference, photos, tmp_path):
    """Without the source another model comes out; with it left out, the one of no such settings."""
    for folder, settings in (("none", []), ("off", [*photos, "data.mix.photos.share=0"])):
        code, text = scripts.run("train_tokenizer", [preset, "--output", tmp_path / folder, *settings])
        assert code == 0, text
    assert_same_run(tmp_path / "off", tmp_path / "none", "tokenizer")
    assert logged(tmp_path / "none", "tokenizer")[0] != logged(reference, "tokenizer")[0]


def test_a_killed_run_of_two_sources_goes_on_to_the_same_weights(scripts, preset, photos, reference, tmp_path):
    argv = [preset, "--output", tmp_path, *photos]
    stop_at(scripts, argv, "tokenizer", 8)
    code, text = scripts.run("train_tokenizer", argv)
    assert code == 0 and "Resumed from" in text, text
    assert_same_run(tmp_path, reference, "tokenizer")


def test_two_processes_and_two_rounds_train_as_one(scripts, preset, photos, reference, tmp_path):
    argv = [preset, "--output", tmp_path, *photos, "train_tokenizer.grad_accumulation=2"]
    code, text = scripts.run("train_tokenizer", argv, processes=2)
    assert code == 0, text
    assert_same_up_to_rounding(tmp_path, reference, "tokenizer")


def test_other_stages_do_not_see_what_is_mixed_in(scripts, preset, photos, reference, tmp_path):
    """The codes of a run are those of data.source alone, and the transformer knows its classes alone."""
    for script in ("encode_dataset", "train_transformer"):
        code, text = scripts.run(script, [preset, "--output", reference, *photos])
        assert code == 0, text
    assert "54 images" in text
    assert '"across"' in (reference / "pipeline" / "model_index.json").read_text()
    assert "any" not in (reference / "pipeline" / "model_index.json").read_text()
