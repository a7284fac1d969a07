"""Decoding, the order of steps and augmentation, on images made here."""

import io
import json
import logging
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from spectralar.interface.image import preprocess_pil
from spectralar.interface.labels import LabelNames
from train.configs.config import DataConfig
from train.data.images import Prefetch, _scale, augment, describe_classes, load_images, to_float


def encoded(image: Image.Image, kind: str, **options) -> Image.Image:
    """`image` written to a file's bytes and opened again."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


def ramp(size: int) -> np.ndarray:
    """(size, size) uint8, brighter from left to right."""
    return np.tile(np.linspace(0, 255, size).astype(np.uint8), (size, 1))


def write_classes(root, counts: dict[str, int]) -> DataConfig:
    """Training images 8x8 in class folders; all grey levels differ: 100 * class + number."""
    for position, (name, count) in enumerate(counts.items()):
        (root / "train" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 100 * position + i).save(root / "train" / name / f"{i:03}.png")
    return DataConfig(source=str(root), image_size=8, channels=1)


# One image ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_grey_or_colour(mode, channels):
    via = {"RGBa": "RGBA", "PA": "P"}.get(mode, "RGB")  # PIL converts to some modes from few others
    white = Image.new("RGB", (12, 12), "white").convert(via).convert(mode)
    pixels = preprocess_pil(white, 8, channels)
    assert pixels.shape == (channels, 8, 8)
    assert pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    assert pixels.min() >= 254


def test_colours_keep_their_channels():
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    assert preprocess_pil(image, 8, 3)[:, 3, 3].tolist() == [200, 100, 50]
    assert preprocess_pil(image, 8, 1)[0, 3, 3] == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)


def test_transparency_is_flattened_on_white():
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 4, 8))
    pixels = preprocess_pil(half, 8, 3)
    assert pixels[:, 0, 0].tolist() == [0, 0, 255]
    assert pixels[:, 0, 7].tolist() == [255, 255, 255]
    # A palette entry, and a grey level, declared transparent in the file.
    palette = encoded(half.convert("RGB").quantize(2), "PNG", transparency=0)
    assert palette.mode == "P" and (preprocess_pil(palette, 8, 1) == 255).any()
    grey = encoded(Image.new("L", (8, 8), 7), "PNG", transparency=7)
    assert (preprocess_pil(grey, 8, 1) == 255).all()


def test_16_bits_are_scaled_not_clipped():
    wide = Image.fromarray(ramp(8).astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    for image in (wide, encoded(wide, "PNG"), wide.convert("I")):
        assert np.array_equal(preprocess_pil(image, 8, 1)[0], ramp(8))
    assert np.array_equal(preprocess_pil(Image.fromarray(ramp(8).astype(np.int32)), 8, 1)[0], ramp(8))
    assert np.array_equal(preprocess_pil(Image.fromarray(ramp(8) / np.float32(255)), 8, 1)[0], ramp(8))


def test_orientation_of_cameras_is_applied():
    image = Image.fromarray(ramp(8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    turned = encoded(image, "PNG", exif=exif)
    assert np.array_equal(preprocess_pil(turned, 8, 1)[0], np.rot90(ramp(8), -1))


@pytest.mark.parametrize("size", [(30, 10), (10, 30)])
def test_crop_is_central(size):
    image = Image.new("L", size, 0)
    image.paste(255, ((size[0] - 10) // 2, (size[1] - 10) // 2, (size[0] + 10) // 2, (size[1] + 10) // 2))
    for side in (4, 10, 20):
        assert (preprocess_pil(image, side, 1) == 255).all()


def test_shrinking_does_not_alias():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))  # the finest there are: grey from afar
    pixels = preprocess_pil(Image.fromarray(stripes), 8, 1)
    assert np.abs(pixels[0, :, 1:-1].astype(int) - 127).max() <= 3


def test_to_float_spans_minus_one_to_one():
    assert torch.equal(to_float(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([-1.0, 1.0]))
    assert to_float(torch.arange(256, dtype=torch.uint8)).dtype == torch.float32


# One split ------------------------------------------------------------------------------------------------


def test_broken_images_are_counted_named_once_and_left_out(tmp_path, caplog):
    cfg = write_classes(tmp_path, {"cat": 3, "dog": 2})
    photo = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photo, "JPEG")
    (tmp_path / "train" / "cat" / "cut.jpg").write_bytes(photo.getvalue()[:1500])
    (tmp_path / "train" / "cat" / "text.png").write_text("not an image")
    (tmp_path / "train" / "dog" / "000.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        data = load_images(cfg, "train")
    assert data.num_broken == 3
    assert data.labels.tolist() == [0, 0, 0, 1]
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2, 101]
    assert len(caplog.messages) == 1
    assert "3 of 7 images" in caplog.text
    assert "'cat/cut.jpg', 'cat/text.png', 'dog/000.png'" in caplog.text


def test_large_jpegs_decode_small_and_look_the_same(tmp_path):
    wave = np.sin(np.linspace(0, 12 * np.pi, 256))  # 6 periods, which an eighth of the pixels would blur
    image = Image.fromarray((127 + 120 * np.outer(wave, wave)).astype(np.uint8))
    (tmp_path / "train" / "a").mkdir(parents=True)
    image.save(tmp_path / "train" / "a" / "0.jpg", quality=95)
    data = load_images(DataConfig(source=str(tmp_path), image_size=32), "train")
    assert np.abs(data.images[0].int().numpy() - preprocess_pil(image, 32, 1).astype(int)).max() <= 3


def test_limit_is_a_fixed_sample_of_all_classes(tmp_path):
    cfg = write_classes(tmp_path, {"cat": 50, "dog": 50})
    cfg.limit = 20
    data = load_images(cfg, "train")
    assert len(data) == 20
    assert min(torch.bincount(data.labels, minlength=2)) >= 5
    assert torch.equal(data.images[:, 0, 0, 0] >= 100, data.labels == 1)
    assert torch.equal(load_images(cfg, "train").images, data.images)
    cfg.limit = 200
    assert len(load_images(cfg, "train")) == 100


def test_class_names_become_readable(tmp_path):
    cfg = write_classes(tmp_path, {"n1": 1, "n2": 1, "n3": 1, "n4": 1})
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"n1": "goldfish, Carassius auratus", "n2": ["crane", "bird"], "n3": "crane"}))
    cfg.class_names = str(path)
    names = load_images(cfg, "train").class_names
    assert names == ["goldfish, Carassius auratus", "crane (n2), bird", "crane (n3)", "n4"]
    shown = LabelNames(dict(enumerate(names)), 4)
    assert shown.shown == ["goldfish", "crane (n2)", "crane (n3)", "n4"]
    assert shown.ids(["Carassius auratus", "bird"]) == [0, 1]
    for wrong in ("[]", "{", '{"n1": 3}', '{"n1": []}'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="data.class_names=.*names.json"):
            load_images(cfg, "train")


def test_split_is_train_or_eval(tmp_path):
    with pytest.raises(ValueError, match="'train' or 'eval', not 'test'"):
        load_images(write_classes(tmp_path, {"a": 1}), "test")


# Steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["once", "on-the-fly"])
def test_gathered_images_are_those_asked_for_and_a_copy(tmp_path, decode):
    cfg = write_classes(tmp_path, {"cat": 5, "dog": 5})
    cfg.decode, chosen = decode, torch.tensor([7, 0, 7])
    data = load_images(cfg, "train")
    for _ in range(2):
        batch = data.gather(chosen)
        assert batch.shape == (3, 1, 8, 8) and batch[:, 0, 0, 0].tolist() == [102, 0, 102]
        batch.zero_()  # what is mapped from a pack must not be written to


def test_prefetch_is_a_step_ahead_and_follows_jumps():
    main, loaded = threading.current_thread(), []

    def load(step: int) -> list[int]:
        assert threading.current_thread() is not main
        loaded.append(step)
        return [step]

    fetch = Prefetch(load)
    for step in (3, 4, 4, 9, 10):
        assert fetch(step) == [step]
    assert fetch(10) is fetch(10)
    fetch(11)
    assert loaded[:6] == [3, 4, 5, 9, 10, 11] and loaded[6:] in ([], [12])  # which may have begun


def test_what_a_load_raises_comes_when_its_step_does():
    fetch = Prefetch(lambda step: 1 // (5 - step))
    assert fetch(4) == 1
    with pytest.raises(ZeroDivisionError):
        fetch(5)


# Augmentation ---------------------------------------------------------------------------------------------


ALL = ["flip", "shift", "crop", "scale", "color"]


def random_images(n: int, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("names", [["flip"], ["shift"], ["crop"], ["scale"], ["color"], ALL])
def test_slices_of_a_step_are_augmented_as_the_whole(names):
    images = random_images(12)
    whole = augment(images, names, torch.Generator().manual_seed(5))
    assert (whole.shape, whole.dtype) == (images.shape, torch.uint8)
    assert not torch.equal(whole, images)
    for world in (2, 3):
        size = 12 // world
        parts = [
            augment(images[rank * size : (rank + 1) * size], names, torch.Generator().manual_seed(5), rank, world)
            for rank in range(world)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_generator_moves_on_as_far_on_every_process():
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    augment(random_images(4), ALL, generators[0], 1, 2)
    augment(random_images(8), ALL, generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_flip_mirrors_half_of_the_images():
    images = random_images(400)
    flipped = augment(images, ["flip"], torch.Generator().manual_seed(0))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(same, ~mirrored)
    assert 160 < same.sum() < 240


def test_shift_moves_by_at_most_one_pixel_and_repeats_the_edge():
    image = random_images(1)
    padded = torch.nn.functional.pad(image.float(), (1, 1, 1, 1), mode="replicate").to(torch.uint8)
    moves = {(y - 1, x - 1): padded[0, :, 2 - y : 10 - y, 2 - x : 10 - x] for y in range(3) for x in range(3)}
    shifted = augment(image.expand(900, -1, -1, -1), ["shift"], torch.Generator().manual_seed(0))
    found = {move: sum(torch.equal(a, expected) for a in shifted) for move, expected in moves.items()}
    assert sum(found.values()) == 900
    assert min(found.values()) > 60  # all nine, about equally often


def test_crop_shows_a_part_at_least_eight_tenths_wide():
    ramps = torch.from_numpy(ramp(64)).expand(300, 2, -1, -1).clone()
    ramps[:, 1] = ramps[:, 0].mT  # channel 0 gives x, channel 1 gives y, 0..255
    cropped = augment(ramps, ["crop"], torch.Generator().manual_seed(0)).float()
    for channel, axis in ((0, -1), (1, -2)):
        line = cropped[:, channel].mean(-2 if axis == -1 else -1)  # (300, 64)
        width = (line[:, 56] - line[:, 7]) / 49 * 63 / 255  # slope: share of the side seen
        assert width.min() > 0.78 and width.max() < 1.02
        assert width.min() < 0.83 and width.max() > 0.97
    assert torch.allclose(line[:, 32].mean(), torch.tensor(128.0), atol=4)  # no side is preferred


def test_scale_enlarges_and_shrinks_a_little_about_the_centre():
    size = 64
    images = torch.zeros(300, 2, size, size, dtype=torch.uint8)
    images[:, :, 20:44, 20:44] = 255  # a square of 24
    scaled = augment(images, ["scale"], torch.Generator().manual_seed(0)).double() / 255
    sides = scaled[:, 0].sum(dim=(1, 2)).sqrt() / 24
    assert 0.915 < sides.min() < 0.93 and 1.07 < sides.max() < 1.085
    assert sides.mean() == pytest.approx(1, abs=0.01)
    for axis in (1, 2):  # of an image of one channel
        marginal = scaled[:, 0].sum(dim=axis)
        centre = (marginal * torch.arange(size)).sum(dim=1) / marginal.sum(dim=1)
        assert (centre - (size - 1) / 2).abs().max() < 0.02
    assert torch.equal(scaled[:, 0], scaled[:, 1])


def test_scale_is_that_of_a_bicubic_filter():
    """PIL's, which cuts its kernel off at the edges: compared away from them."""
    pixels = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 66, 66), 3, 1).mul(255).to(torch.uint8)
    for factor in (0.92, 0.97, 1.0, 1.08):
        scaled = _scale(pixels, torch.tensor([factor]))[0, 0].int()
        reach = 32 / factor  # what is seen of the image, from its centre
        if factor < 1:
            with_edge = np.pad(pixels[0, 0].numpy(), 8, mode="edge")
            box = (40 - reach, 40 - reach, 40 + reach, 40 + reach)
        else:
            with_edge, box = pixels[0, 0].numpy(), (32 - reach, 32 - reach, 32 + reach, 32 + reach)
        expected = Image.fromarray(with_edge).resize((64, 64), Image.Resampling.BICUBIC, box=box)
        difference = (scaled - torch.from_numpy(np.array(expected).astype(np.int32))).abs()
        assert difference[4:-4, 4:-4].max() <= 1, factor
    assert torch.equal(_scale(pixels, torch.ones(1)), pixels)


def test_color_keeps_white_and_black_and_moves_channels_much_together():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(500, 3, -1, -1)
    changed = augment(levels, ["color"], torch.Generator().manual_seed(0)).flatten(2)  # (500, 3, 256)
    assert (changed[..., 0] == 0).all() and (changed[..., -1] == 255).all()
    assert (changed[..., 1:] >= changed[..., :-1]).all()
    exponents = (changed[..., 128].double() / 255).log() / np.log(128 / 255)
    assert 0.73 < exponents.min() < 0.85 and 1.2 < exponents.max() < 1.36
    logs = exponents.log()
    assert logs.mean().abs() < 0.02  # neither brighter nor darker on the whole
    spread = (logs.amax(dim=1) - logs.amin(dim=1)).amax()
    assert 0.15 < spread < 0.22
    assert logs.mean(dim=1).std() > 2 * (logs - logs.mean(dim=1, keepdim=True)).std() * 0.9


@pytest.mark.parametrize("name", ["shift", "crop", "scale", "color"])
def test_a_product_on_white_stays_on_white(name):
    images = torch.full((200, 3, 16, 16), 255, dtype=torch.uint8)
    images[:, :, 4:12, 4:12] = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8)
    changed = augment(images, [name], torch.Generator().manual_seed(0))
    for edge in (changed[:, :, 0], changed[:, :, -1], changed[..., 0], changed[..., -1]):
        assert (edge == 255).all()


def test_unknown_augmentation_is_named():
    with pytest.raises(ValueError, match="'turn'.*'flip', 'shift', 'crop', 'scale', 'color'"):
        augment(random_images(2), ["turn"], torch.Generator())


# The classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, balance, said", [
    ([3, 3], "none", "6 images, 3 in each of 2 classes."),
    ([4], "none", "4 images of one class."),
    ([2, 5, 3], "none", "10 images of 3 classes, from 2 ('a') to 5 ('b') a class."),
    ([2, 0, 3], "sqrt", "5 images of 2 classes, from 2 ('a') to 3 ('c') a class. None of 'b'. Classes are drawn by "
     "the square root of these."),
    ([1, 10], "even", "11 images of 2 classes, from 1 ('a') to 10 ('b') a class. Classes are drawn evenly."),
    ([1, 10], "none", "11 images of 2 classes, from 1 ('a') to 10 ('b') a class. data.class_balance=sqrt draws small "
     "classes more often, data.class_balance=even all equally often."),
])  # fmt: skip
def test_what_the_classes_are_is_said(sizes, balance, said):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    assert describe_classes(labels, list("abc")[: len(sizes)], balance) == said


def test_classes_are_drawn_as_set(tmp_path):
    cfg = write_classes(tmp_path, {"cat": 30, "dog": 3})
    for balance, dogs in (("none", 3), ("even", 16)):
        cfg.class_balance = balance
        data = load_images(cfg, "train")  # decoded once for both
        epoch = torch.cat([data.step_indices(3, 0, step) for step in range(11)])
        assert abs(int(data.labels[epoch].sum()) - dogs) <= 1
