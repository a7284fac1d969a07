"""Every kind of source, on data made here: what is read, how it is split, and what is said about an unfit one."""

import gzip
import io
import struct

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from spectralar.interface.image import preprocess_pil
from train.configs.config import DataConfig
from train.data.images import load_images


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    """`datasets` keeps a copy of all Parquet it reads: here, not in the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(colour, size=(8, 8), kind="PNG") -> bytes:
    """A plain image as a file's bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def write_folders(root, counts: dict[str, int]) -> None:
    """`counts` images in each folder; the red channel is 10 times the position of the folder."""
    for position, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03}.png").write_bytes(encoded((10 * position, i, 0)))


def write_parquet(path, greys: list, labels: list, label_feature) -> None:
    """A row for each grey level, or for what is given as an image instead of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": label_feature})
    images = [encoded((grey, grey, grey)) if isinstance(grey, int) else grey for grey in greys]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)


def write_idx(path, array: np.ndarray, zipped: bool) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.with_name(path.name + ".gz" * zipped).write_bytes(gzip.compress(content) if zipped else content)


def write_fashion_mnist(root, zipped: bool) -> np.ndarray:
    """5 training and 3 test images; returns the training images."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 5), ("t10k", 3)):
        images = rng.integers(1, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(root / f"{name}-images-idx3-ubyte", images, zipped)
        write_idx(root / f"{name}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) + 5, zipped)
        if name == "train":
            train = images
    return train


# Fashion-MNIST --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_is_padded_not_resized(tmp_path, zipped):
    pixels = write_fashion_mnist(tmp_path, zipped)
    data = load_images(DataConfig(root=str(tmp_path)), "train")
    assert data.images.shape == (5, 1, 32, 32)
    assert data.images.dtype == torch.uint8
    assert np.array_equal(data.images[:, 0, 2:30, 2:30], pixels)
    assert data.images.sum() == pixels.sum(dtype=np.int64)  # so the margin is black
    assert data.labels.tolist() == [5, 6, 7, 8, 9]
    assert data.class_names[9] == "Ankle boot"
    assert len(load_images(DataConfig(root=str(tmp_path)), "eval")) == 3


def test_fashion_mnist_in_other_sizes_and_colours(tmp_path):
    pixels = write_fashion_mnist(tmp_path, zipped=False)
    own = load_images(DataConfig(root=str(tmp_path), image_size=28, channels=3), "train").images
    assert np.array_equal(own, np.repeat(pixels[:, None], 3, axis=1))
    double = load_images(DataConfig(root=str(tmp_path), image_size=64), "train").images
    padded = np.pad(pixels[0], 2)
    assert np.array_equal(double[0], preprocess_pil(Image.fromarray(padded), 64, 1))


def test_fashion_mnist_folder_may_come_from_the_environment(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path, zipped=True)
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    assert len(load_images(DataConfig(), "train")) == 5


def test_missing_or_broken_fashion_mnist_says_what_to_do(tmp_path):
    cfg = DataConfig(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist.*data.root"):
        load_images(cfg, "train")
    write_fashion_mnist(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    one_byte_short = gzip.compress(gzip.decompress(whole)[:-1])
    for broken in (whole[: len(whole) // 2], b"no gzip", one_byte_short, gzip.compress(b"")):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz.*fetch it again"):
            load_images(cfg, "train")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="splits 'train' and 'test', not 'val'"):
        load_images(DataConfig(root=str(tmp_path), eval_split="val"), "eval")


# Folders --------------------------------------------------------------------------------------------------


def test_folders_with_splits_keep_them_apart(tmp_path):
    write_folders(tmp_path / "train", {"cat": 3, "dog": 2})
    write_folders(tmp_path / "test", {"dog": 1})  # a class may be missing here, and keeps its number
    cfg = DataConfig(source=str(tmp_path), image_size=8, channels=3)
    train, held_out = load_images(cfg, "train"), load_images(cfg, "eval")
    assert train.class_names == held_out.class_names == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert held_out.labels.tolist() == [1]
    assert train.images[4, :, 0, 0].tolist() == [10, 1, 0]


def test_folders_without_splits_hold_out_a_tenth_of_each_class(tmp_path):
    write_folders(tmp_path, {"cat": 40, "dog": 20, "emu": 3, "yak": 1})
    cfg = DataConfig(source=str(tmp_path), image_size=8, channels=3)
    train, held_out = load_images(cfg, "train"), load_images(cfg, "eval")
    assert torch.bincount(held_out.labels, minlength=4).tolist() == [4, 2, 1, 0]
    assert torch.bincount(train.labels, minlength=4).tolist() == [36, 18, 2, 1]
    colours = {tuple(image[:, 0, 0].tolist()) for data in (train, held_out) for image in data.images}
    assert len(colours) == 64  # every image once, on one side only
    assert torch.equal(load_images(cfg, "eval").images, held_out.images)
    assert held_out.images[:4, 1, 0, 0].tolist() != [0, 1, 2, 3]  # neighbours are often alike
    # A new image may take the place of one of its class, and leaves all others where they are.
    (tmp_path / "cat" / "new.png").write_bytes(encoded((99, 99, 99)))
    kept = load_images(cfg, "eval")
    assert sum(torch.equal(a, b) for a, b in zip(kept.images, held_out.images, strict=True)) >= 3
    assert torch.equal(kept.images[kept.labels > 0], held_out.images[held_out.labels > 0])


def test_equal_split_names_hold_out_a_tenth(tmp_path):
    write_folders(tmp_path / "train", {"cat": 20})
    cfg = DataConfig(source=str(tmp_path), image_size=8, channels=3, eval_split="train")
    assert (len(load_images(cfg, "train")), len(load_images(cfg, "eval"))) == (18, 2)


def test_folders_may_nest_and_other_files_do_not_count(tmp_path):
    write_folders(tmp_path / "train" / "cat", {"images": 2})
    (tmp_path / "train" / "cat" / "boxes.txt").write_text("0 0 64 64")
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "train" / ".cache").mkdir()
    data = load_images(DataConfig(source=str(tmp_path), image_size=8), "train")
    assert (len(data), data.num_broken, data.class_names) == (2, 0, ["cat"])


def test_unfit_folders_say_what_would_be_right(tmp_path, monkeypatch):
    def sentence(root, kind=ValueError, split="train") -> str:
        with pytest.raises(kind) as caught:
            load_images(DataConfig(source=str(root), image_size=8), split)
        return str(caught.value)

    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(encoded("red"))
    assert "no class folders" in sentence(tmp_path / "flat")
    write_folders(tmp_path / "a" / "train", {"cat": 1})
    write_folders(tmp_path / "a" / "val", {"cat": 1, "dog": 1})
    assert "no folder 'test' but 'train', 'val'" in sentence(tmp_path / "a", FileNotFoundError, "eval")
    (tmp_path / "a" / "val").rename(tmp_path / "a" / "test")
    assert "classes" in sentence(tmp_path / "a", split="eval") and "'dog'" in sentence(tmp_path / "a", split="eval")
    write_folders(tmp_path / "b" / "training", {"cat": 1})
    write_folders(tmp_path / "b" / "validation", {"cat": 1})
    assert "set data.train_split" in sentence(tmp_path / "b")
    (tmp_path / "c" / "cat").mkdir(parents=True)
    assert "no class folders with images" in sentence(tmp_path / "c")
    assert "does not exist" in sentence(tmp_path / "nowhere", FileNotFoundError)
    monkeypatch.chdir(tmp_path / "flat")  # where the name alone could be one on the Hub
    assert "not Parquet" in sentence("a.png", FileNotFoundError)


# Parquet and the Hub --------------------------------------------------------------------------------------


def test_parquet_files_go_by_the_names_of_their_splits(tmp_path):
    feature = datasets.ClassLabel(names=["n02", "n01"])
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [10, 20], [1, 0], feature)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [30], [0], feature)
    write_parquet(tmp_path / "valid" / "0.parquet", [40, 50], [0, 1], feature)
    cfg = DataConfig(source=str(tmp_path), image_size=8, eval_split="valid")
    train, held_out = load_images(cfg, "train"), load_images(cfg, "eval")
    assert (train.images[:, 0, 0, 0].tolist(), train.labels.tolist()) == ([10, 20, 30], [1, 0, 0])
    assert (held_out.images[:, 0, 0, 0].tolist(), held_out.labels.tolist()) == ([40, 50], [0, 1])
    assert train.class_names == held_out.class_names == ["n02", "n01"]


@pytest.mark.parametrize("source", ["train", "train/images.parquet", "train/im*.parquet"])
def test_parquet_without_splits_is_one_pool(tmp_path, source):
    # The folder above is no part of the source, so its name says nothing.
    write_parquet(tmp_path / "train" / "images.parquet", [10, 20, 30], [0] * 3, datasets.ClassLabel(names=["a"]))
    cfg = DataConfig(source=str(tmp_path / source), image_size=8)
    train, held_out = load_images(cfg, "train"), load_images(cfg, "eval")
    assert (len(train), len(held_out)) == (2, 1)
    assert sorted(torch.cat([train.images, held_out.images])[:, 0, 0, 0].tolist()) == [10, 20, 30]


def test_parquet_labels_may_be_numbers_or_words(tmp_path):
    write_parquet(tmp_path / "train.parquet", [1, 2, 3], ["tree", "bus", "tree"], datasets.Value("string"))
    write_parquet(tmp_path / "test.parquet", [4], ["tree"], datasets.Value("string"))
    cfg = DataConfig(source=str(tmp_path), image_size=8)
    assert load_images(cfg, "train").labels.tolist() == [1, 0, 1]
    held_out = load_images(cfg, "eval")  # without a bus, and its tree is number 1 all the same
    assert (held_out.labels.tolist(), held_out.class_names) == ([1], ["bus", "tree"])
    write_parquet(tmp_path / "test.parquet", [4], ["car"], datasets.Value("string"))
    with pytest.raises(ValueError, match="1 of 1 images .* have no class that the training split knows"):
        load_images(cfg, "eval")


def test_unfit_parquet_says_what_would_be_right(tmp_path):
    path = tmp_path / "data" / "train.parquet"
    write_parquet(path, [1, 2], [0, -1], datasets.ClassLabel(names=["a"]))
    whole = DataConfig(source=str(tmp_path / "data"), image_size=8, eval_split="train")
    for changes, named in (
        ({}, "1 of 2 images"),
        ({"image_column": "img"}, "no column 'img' but 'image', 'label': set data.image_column"),
        ({"label_column": "class"}, "set data.label_column"),
        ({"image_column": "label"}, "holds no images"),
        ({"label_column": "image"}, "holds not one class an image"),
        ({"eval_split": "test"}, "data.eval_split='test' but of 'train'"),
        ({"train_split": "learn", "eval_split": "test"}, "data.train_split='learn' but of 'train'"),
    ):
        with pytest.raises(ValueError, match=named):
            load_images(DataConfig(**(vars(whole) | changes)), "train")
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot load split 'train' of .*train.parquet"):
        load_images(whole, "train")
    with pytest.raises(FileNotFoundError, match="no such Parquet file"):
        load_images(DataConfig(source=str(tmp_path / "*.parquet")), "train")


def test_hub_splits_go_by_their_names(monkeypatch):
    def load_dataset(source, split):
        assert source == "owner/name"
        n = {"train": 20, "validation": 2}[split]
        images = [{"bytes": encoded((i, i, i)), "path": None} for i in range(n)]
        features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a"])})
        return datasets.Dataset.from_dict({"img": images, "fine": [0] * n}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cfg = DataConfig(source="owner/name", image_size=8, image_column="img", label_column="fine")
    cfg.eval_split = "validation"
    assert (len(load_images(cfg, "train")), len(load_images(cfg, "eval"))) == (20, 2)
    cfg.eval_split = "train"
    assert (len(load_images(cfg, "train")), len(load_images(cfg, "eval"))) == (18, 2)
    cfg.eval_split = "nowhere"
    with pytest.raises(ValueError, match="cannot load split 'nowhere' of 'owner/name'"):
        load_images(cfg, "eval")


def test_broken_rows_are_left_out(tmp_path):
    feature = datasets.ClassLabel(names=["a", "b"])
    write_parquet(tmp_path / "train.parquet", [10, b"junk", None, 40], [0, 1, 1, 1], feature)
    write_parquet(tmp_path / "test.parquet", [b"", None], [0, 1], feature)
    cfg = DataConfig(source=str(tmp_path), image_size=8)
    data = load_images(cfg, "train")
    assert (data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), data.num_broken) == ([10, 40], [0, 1], 2)
    with pytest.raises(ValueError, match="None of the 2 images"):
        load_images(cfg, "eval")
