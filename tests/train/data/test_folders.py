"""Folders as people have them: what counts as an image, a class and a split, and how what does not is told."""

import json
import logging
import os

import datasets
import numpy as np
import pytest

from tests.train.data.test_sources import encoded, write_folders, write_parquet
from train.configs.config import DataConfig
from train.data.images import load_images, load_splits
from train.data.sources import source_version


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))


def config(root, **settings) -> DataConfig:
    return DataConfig(source=str(root), **{"image_size": 8, "channels": 3, "eval_split": "train", **settings})


def load(root, caplog, split: str = "train", **settings):
    """The images of a split, and what was logged about them."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        data = load_images(config(root, **settings), split)
    return data, caplog.text


def refusal(root, **settings) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load_splits(config(root, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What counts ----------------------------------------------------------------------------------------------


def test_what_systems_and_programs_leave_behind_is_no_class_and_no_image(tmp_path, caplog):
    write_folders(tmp_path / "X", {"cat": 5, "dog": 5, "__MACOSX": 5, ".git": 5, "@eaDir": 1})
    write_folders(tmp_path / "X" / "cat", {".ipynb_checkpoints": 3, "__MACOSX": 2, "white": 2})
    (tmp_path / "X" / "cat" / "._000.png").write_bytes(b"")
    (tmp_path / "X" / "cat" / ".DS_Store").write_bytes(b"")
    data, said = load(tmp_path / "X", caplog)
    assert data.class_names == ["cat", "dog"] and len(data) == 10  # of 12; two are held out
    assert data.num_broken == 0
    assert "left out are 6 hidden or of the system ('.git', '@eaDir', '__MACOSX' and 3 more)." in said


def test_empty_class_folders_are_no_classes(tmp_path, caplog):
    write_folders(tmp_path / "X", {"ant": 0, "cat": 3, "dog": 3, "emu": 0})
    (tmp_path / "X" / "emu" / "notes.txt").write_text("none yet")
    data, said = load(tmp_path / "X", caplog)
    assert data.class_names == ["cat", "dog"]
    assert "1 in no format that is read here ('emu/notes.txt'); 2 folders without images ('ant', 'emu')." in said


def test_files_of_other_formats_are_counted_each_time(tmp_path, caplog):
    write_folders(tmp_path / "X", {"cat": 10})
    for i in range(30):
        (tmp_path / "X" / "cat" / f"{i}.HEIC").write_bytes(b"ftypheic")
    (tmp_path / "X" / "cover.png").write_bytes(encoded("red"))
    for _ in range(2):  # decoded, and from the cache
        data, said = load(tmp_path / "X", caplog)
        assert len(data) == 9
        assert "left out are 30 in no format that is read here ('cat/0.HEIC', 'cat/1.HEIC', 'cat/10.HEIC' and " in said
        assert "1 in no class folder ('cover.png')" in said
    write_folders(tmp_path / "Y", {"cat": 0})
    (tmp_path / "Y" / "cat" / "1.heic").write_bytes(b"ftypheic")
    assert "no class folders with images" in refusal(tmp_path / "Y") and "'cat/1.heic'" in refusal(tmp_path / "Y")


def test_formats_that_are_only_written_are_no_images(tmp_path, caplog):
    write_folders(tmp_path / "X", {"cat": 3})
    (tmp_path / "X" / "cat" / "paper.pdf").write_bytes(b"%PDF")
    data, said = load(tmp_path / "X", caplog)
    assert data.num_broken == 0 and "'cat/paper.pdf'" in said


def test_links_are_followed_but_not_in_circles(tmp_path, caplog):
    write_folders(tmp_path / "elsewhere", {"more": 4})
    write_folders(tmp_path / "X", {"cat": 3, "dog": 3})
    (tmp_path / "X" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "X" / "emu").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "X" / "dog" / "up").symlink_to(tmp_path / "X")
    (tmp_path / "X" / "dog" / "gone.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "X" / "dog" / "self").symlink_to(tmp_path / "X" / "dog" / "self")
    os.mkfifo(tmp_path / "X" / "dog" / "pipe.png")  # to open it would be to wait for ever
    data, said = load(tmp_path / "X", caplog)
    sizes = np.bincount(data.labels.numpy()) + np.bincount(load_images(config(tmp_path / "X"), "eval").labels.numpy())
    assert dict(zip(data.class_names, sizes, strict=True)) == {"cat": 7, "dog": 3, "emu": 4}
    assert "links to nowhere ('dog/gone.png', 'dog/self')" in said
    assert "1 links to a folder that they are in ('dog/up')" in said
    assert "1 neither files nor folders ('dog/pipe.png')" in said


def test_a_change_is_a_change_of_what_counts(tmp_path):
    root = tmp_path / "X"
    write_folders(root, {"cat": 3})
    write_folders(tmp_path, {"linked": 1})
    (root / "cat" / "more").symlink_to(tmp_path / "linked")
    version = source_version(config(root))
    write_folders(root / "cat", {".ipynb_checkpoints": 1, "__MACOSX": 1})
    assert source_version(config(root)) == version
    (tmp_path / "linked" / "new.png").write_bytes(encoded("red"))
    assert source_version(config(root)) != version


# Names ----------------------------------------------------------------------------------------------------


def test_names_may_be_any_bytes(tmp_path, caplog):
    root = os.fsencode(tmp_path / "X")
    for name, count in ((b"caf\xe9", 3), (b"caf\xe8", 3), ("naïve".encode(), 2)):
        os.makedirs(os.path.join(root, name))
        for i in range(count):
            with open(os.path.join(root, name, b"\xff%d.png" % i), "wb") as file:
                file.write(encoded((i, 0, 0)))
    with open(os.path.join(root, b"caf\xe9", b"\xfe.png"), "wb") as file:
        file.write(b"broken")
    with open(os.path.join(root, b"caf\xe9", b"\xfe.heic"), "wb"):
        pass
    data, said = load(tmp_path / "X", caplog)
    heldout = load_images(config(tmp_path / "X"), "eval")
    assert data.class_names == ["caf\\xe8", "caf\\xe9", "naïve"]
    assert len(data) + len(heldout) == 8 and data.num_broken + heldout.num_broken == 1
    assert "xfe.heic" in said
    json.dumps(data.class_names, ensure_ascii=False).encode()  # no text that cannot be written


@pytest.mark.parametrize(
    "name", ["my #1 photos", "[x]", "{a,b}", "a: b", "*", "?", "100%", "${x}", "'q'", "train", "test"]
)
def test_folders_and_classes_may_be_called_anything(tmp_path, name):
    write_folders(tmp_path / name, {name: 3, "other": 3})
    train, heldout = load_splits(config(tmp_path / name, eval_split="test"))
    assert sorted(train.class_names) == sorted([name, "other"]) and len(train) == 4 and len(heldout) == 2


# Splits ---------------------------------------------------------------------------------------------------


def test_a_missing_split_or_class_is_said_before_anything_is_decoded(tmp_path):
    write_folders(tmp_path / "X" / "train", {"cat": 3, "dog": 3})
    cache = tmp_path / "cache"
    text = refusal(tmp_path / "X", eval_split="test", cache=str(cache))
    assert "has no folder 'test' but 'train'" in text and "the same as data.train_split" in text
    write_folders(tmp_path / "X" / "test", {"cow": 1})
    assert "has classes that" in refusal(tmp_path / "X", eval_split="test", cache=str(cache))
    assert not cache.exists()


def test_fewer_images_than_a_batch_are_said_before_anything_is_decoded(tmp_path):
    write_folders(tmp_path / "X", {"cat": 5})
    cfg = config(tmp_path / "X", cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="There are 4 images, fewer than one batch of 5"):
        load_splits(cfg, 5)
    assert not (tmp_path / "cache").exists()
    assert len(load_splits(cfg, 4)[0]) == 4


def test_one_image_a_class_leaves_nothing_to_hold_out(tmp_path):
    write_folders(tmp_path / "X", {"cat": 1, "dog": 1})
    assert "a tenth of each class is held out, which takes two images" in refusal(tmp_path / "X")


def test_a_split_of_loose_images_is_said(tmp_path):
    write_folders(tmp_path / "X" / "train", {"cat": 3})
    write_folders(tmp_path / "X", {"test": 3})
    text = refusal(tmp_path / "X", eval_split="test")
    assert "no images for 'eval' (left out are 3 in no class folder ('000.png', " in text
    assert "set data.eval_split to the same as data.train_split" in text


def test_a_class_may_be_named_like_a_split(tmp_path):
    """Pictures of vehicles: the folder has images, not classes."""
    write_folders(tmp_path / "X", {"car": 3, "train": 3, "validation": 3})
    train, _ = load_splits(config(tmp_path / "X", eval_split="test"))
    assert train.class_names == ["car", "train", "validation"]


# Parquet --------------------------------------------------------------------------------------------------


def test_a_stray_parquet_file_does_not_make_a_folder_parquet(tmp_path, caplog):
    write_folders(tmp_path / "X", {"cat": 3, "dog": 3})
    datasets.Dataset.from_dict({"image": ["cat/000.png"], "label": [1]}).to_parquet(
        tmp_path / "X" / "metadata.parquet"
    )
    (tmp_path / "X" / "broken.parquet").write_bytes(b"no Parquet at all")
    data, said = load(tmp_path / "X", caplog)
    assert data.class_names == ["cat", "dog"] and len(data) == 4
    assert "2 in no format that is read here ('broken.parquet', 'metadata.parquet')" in said
    assert "set data.decode=on-the-fly" in refusal(tmp_path / "X", decode="stream")


@pytest.mark.parametrize("decode", ["once", "stream"])
def test_pictures_beside_parquet_files_do_not_make_it_class_folders(tmp_path, decode):
    labels = datasets.ClassLabel(names=["oak", "elm"])
    write_parquet(tmp_path / "X" / "data" / "train-00000-of-00001.parquet", [1, 2, 3, 4], [0, 1, 0, 1], labels)
    write_parquet(tmp_path / "X" / ".cache" / "train-00001-of-00002.parquet", [9], [0], labels)
    write_folders(tmp_path / "X", {"figures": 2})
    train, heldout = load_splits(config(tmp_path / "X", decode=decode))
    assert train.class_names == ["oak", "elm"] and len(train) + len(heldout) == 4


def test_a_folder_of_parquet_with_other_columns_says_which(tmp_path):
    (tmp_path / "X").mkdir()
    datasets.Dataset.from_dict({"picture": [b""], "label": [1]}).to_parquet(tmp_path / "X" / "a.parquet")
    assert "has no column 'image' but 'picture', 'label'" in refusal(tmp_path / "X")


@pytest.mark.parametrize("name", ["[x]", "my #1 photos", "{a,b}", "100%", "what?"])
def test_parquet_files_may_lie_anywhere(tmp_path, name):
    labels = datasets.ClassLabel(names=["oak", "elm"])
    write_parquet(tmp_path / name / "trees.parquet", [1, 2, 3, 4], [0, 1, 0, 1], labels)
    for source in (tmp_path / name, tmp_path / name / "trees.parquet"):
        for decode in ("once", "stream"):
            assert len(load_splits(config(source, decode=decode))[0]) == 2
