"""Decoded images: found again, made anew when they have to be, gone on with after a kill; decoding at each use."""

import logging
import os
import shutil
from multiprocessing.pool import ThreadPool

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from train.configs.config import DataConfig
from train.data import decoding
from train.data import images as data
from train.data.decoding import LazyImages
from train.data.images import load_images
from train.data.listing import Listing
from train.data.sources import list_images
from train.runs.command_line import parse_arguments

SIZE = 8


@pytest.fixture
def cfg(tmp_path):
    """Two classes of images of one grey each, 100 * class + number, and a cache of their own."""
    for label, (name, count) in enumerate({"cat": 12, "dog": 9}.items()):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for i in range(count):
            write_image(tmp_path / "images" / "train" / name / f"{i:02}.png", 100 * label + i)
    return DataConfig(source=str(tmp_path / "images"), image_size=SIZE, channels=1, cache=str(tmp_path / "cache"))


@pytest.fixture
def opened(monkeypatch):
    """Keys of the images that are opened, in order."""
    keys = []

    def listing(*args) -> Listing:
        found = list_images(*args)
        open_image = found.open_image
        found.open_image = lambda i: keys.append(found.keys[i]) or open_image(i)
        return found

    monkeypatch.setattr(data, "list_images", listing)
    return keys


def write_image(path, grey: int) -> None:
    Image.new("L", (SIZE, SIZE), grey).save(path)


def greys(images) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def packs(cfg: DataConfig) -> list[str]:
    return sorted(path for path in os.listdir(cfg.cache) if not path.endswith(".lock"))


GREYS = [*range(12), *range(100, 109)]


# Packs ----------------------------------------------------------------------------------------------------


def test_images_are_decoded_once(cfg, opened, capsys):
    first = load_images(cfg, "train")
    assert greys(first.images) == GREYS and len(opened) == 21
    (name,) = packs(cfg)
    assert f"21 decoded images are in {cfg.cache}/{name}" in capsys.readouterr().out
    opened.clear()
    again = load_images(cfg, "train")
    assert opened == [] and capsys.readouterr().out == ""
    assert torch.equal(again.images, first.images) and again.images.dtype == torch.uint8
    assert torch.equal(again.labels, first.labels) and again.labels.dtype == torch.int64
    assert again.class_names == ["cat", "dog"]


def test_a_pack_is_shared_by_settings_that_make_no_difference(cfg, opened, tmp_path):
    load_images(cfg, "train")
    opened.clear()
    names = tmp_path / "names.json"
    names.write_text('{"cat": "kitten"}')
    shutil.move(cfg.source, tmp_path / "elsewhere" / "images")
    cfg = DataConfig(**{**vars(cfg), "source": str(tmp_path / "elsewhere" / "images"), "augment": ["flip"],
                        "class_names": str(names), "decode": "on-the-fly"})  # fmt: skip
    assert load_images(cfg, "train").class_names == ["kitten", "dog"]
    assert opened == []


@pytest.mark.parametrize("change", ["image_size", "channels", "limit", "touched", "added", "removed"])
def test_a_pack_is_made_anew_for_other_images(cfg, change):
    load_images(cfg, "train")
    file = os.path.join(cfg.source, "train", "dog", "08.png")
    if change == "touched":
        write_image(file, 55)
        os.utime(file, (1, 1))  # a clock may be coarser than a test is slow
    elif change == "added":
        write_image(os.path.join(os.path.dirname(file), "09.png"), 109)
    elif change == "removed":
        os.remove(file)
    else:
        cfg = DataConfig(**{**vars(cfg), change: {"image_size": 4, "channels": 3, "limit": 5}[change]})
    shape, last = {
        "image_size": ((21, 1, 4, 4), 108), "channels": ((21, 3, 8, 8), 108), "limit": ((5, 1, 8, 8), None),
        "touched": ((21, 1, 8, 8), 55), "added": ((22, 1, 8, 8), 109), "removed": ((20, 1, 8, 8), 107),
    }[change]  # fmt: skip
    found = load_images(cfg, "train")
    assert found.images.shape == shape
    assert last is None or greys(found.images)[-1] == last
    assert len(packs(cfg)) == 2


@pytest.mark.parametrize("file", ["images.bin", "labels.npy", "index.json"])
def test_a_damaged_pack_is_made_anew(cfg, opened, file):
    whole = load_images(cfg, "train").images.clone()
    opened.clear()
    path = os.path.join(cfg.cache, packs(cfg)[0], file)
    os.truncate(path, os.path.getsize(path) - 1)
    assert torch.equal(load_images(cfg, "train").images, whole)
    assert len(opened) == 21


def test_decoding_goes_on_where_it_was_interrupted(cfg, opened, monkeypatch):
    """With a broken image on either side of the interruption."""
    for number in ("01", "11"):
        with open(os.path.join(cfg.source, "train", "cat", f"{number}.png"), "w") as file:
            file.write("not an image")
    monkeypatch.setattr(decoding, "CHUNK_BYTES", 4 * SIZE**2)
    record = decoding._write

    def killed(path, content):
        if content.get("done") == 12:
            raise KeyboardInterrupt  # images 8 to 11 are written, and nobody knows
        record(path, content)

    monkeypatch.setattr(decoding, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        load_images(cfg, "train")
    assert [name.endswith(".partial") for name in packs(cfg)] == [True]
    monkeypatch.setattr(decoding, "_write", record)
    opened.clear()
    found = load_images(cfg, "train")
    assert sorted(opened) == [f"cat/{i:02}.png" for i in range(8, 12)] + [f"dog/{i:02}.png" for i in range(9)]
    assert greys(found.images) == [grey for grey in GREYS if grey not in (1, 11)]
    assert (found.labels == (found.images[:, 0, 0, 0] >= 100)).all()
    assert found.num_broken == 2 and len(packs(cfg)) == 1


def test_progress_that_promises_more_than_is_there_is_not_believed(cfg, monkeypatch):
    load_images(cfg, "train")
    (name,) = packs(cfg)
    partial = os.path.join(cfg.cache, f"{name}.partial")
    os.mkdir(partial)
    shutil.rmtree(os.path.join(cfg.cache, name))
    with open(os.path.join(partial, "progress.json"), "w") as file:
        file.write('{"done": 20, "broken": []}')
    assert greys(load_images(cfg, "train").images) == GREYS


def test_one_process_decodes_and_the_others_wait(cfg, opened):
    with ThreadPool(4) as pool:  # each takes the lock by a file of its own, as processes do
        found = pool.map(lambda _: load_images(cfg, "train"), range(4))
    assert sorted(opened) == sorted(set(opened)) and len(opened) == 21
    assert all(greys(one.images) == GREYS for one in found)


@pytest.mark.parametrize("refusal", ["space", "full", "file"])
def test_a_disk_that_does_not_take_the_images_is_done_without(cfg, monkeypatch, caplog, refusal):
    if refusal == "space":
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(decoding.shutil, "disk_usage", lambda _: usage._replace(free=100))
    elif refusal == "full":

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(decoding.os, "fsync", full)
    else:
        with open(cfg.cache, "w"):
            pass
    with caplog.at_level(logging.WARNING):
        assert greys(load_images(cfg, "train").images) == GREYS
    (said,) = caplog.messages
    assert said.startswith(f"Decoded images cannot be kept in {cfg.cache} (") and "set data.cache" in said
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=100))
    with pytest.raises(ValueError, match="21 images need .* GiB of memory: set data.cache"):
        load_images(cfg, "train")


def test_no_whole_image_is_an_error(cfg):
    for folder in ("cat", "dog"):
        for path in os.scandir(os.path.join(cfg.source, "train", folder)):
            os.truncate(path, 20)
    with pytest.raises(ValueError, match="None of the 21 images of .* can be read"):
        load_images(cfg, "train")
    assert packs(cfg) == []


# At each use ----------------------------------------------------------------------------------------------


def test_images_decoded_at_each_use_are_the_same_and_nothing_is_written(cfg):
    lazy = load_images(DataConfig(**{**vars(cfg), "decode": "on-the-fly"}), "train")
    assert isinstance(lazy.images, LazyImages) and not os.path.exists(cfg.cache)
    packed = load_images(cfg, "train")
    assert lazy.images.shape == packed.images.shape and len(lazy.images) == len(packed.images)
    chosen = torch.tensor([20, 3, 3, 11])
    assert torch.equal(lazy.images[chosen], packed.images[chosen])
    assert torch.equal(lazy.images[5:15], packed.images[5:15])
    assert torch.equal(torch.cat(list(lazy.images.split(8))), packed.images)
    assert torch.equal(lazy.labels, packed.labels)


def test_a_broken_image_is_replaced_by_the_next_of_its_class(cfg):
    for name in ("cat/03", "cat/04", "dog/08"):
        os.truncate(os.path.join(cfg.source, "train", f"{name}.png"), 20)
    cfg.decode = "on-the-fly"
    expected = [0, 1, 2, 5, 5, *range(5, 12), *range(100, 108), 100]
    assert greys(load_images(cfg, "train").images[torch.arange(21)]) == expected
    for path in os.scandir(os.path.join(cfg.source, "train", "dog")):
        os.truncate(path, 20)
    images = load_images(cfg, "train").images
    assert greys(images[torch.arange(12)]) == expected[:12]
    with pytest.raises(OSError, match="None of the 9 images of class 'dog' of .* can be read"):
        images[torch.tensor([0, 15])]


def test_a_dry_run_keeps_no_decoded_images(cfg, tmp_path):
    _, config = parse_arguments("", ["fashion-mnist-32", "--dry-run", "--output", str(tmp_path / "run")])
    config.data = DataConfig(**{**vars(cfg), "decode": config.data.decode})
    load_images(config.data, "train")
    assert not os.path.exists(cfg.cache)


def test_images_are_decoded_a_chunk_at_a_time(cfg, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK_BYTES", 5 * SIZE**2)
    chunks = list(decoding.decode_in_chunks(list_images(cfg, "train"), cfg, 3))
    assert [len(images) for images, _ in chunks] == [5, 5, 5, 3]
    assert np.concatenate([images for images, _ in chunks])[:, 0, 0, 0].tolist() == GREYS[3:]
