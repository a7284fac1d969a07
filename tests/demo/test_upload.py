import io
import struct
import zlib

import gradio as gr
import numpy as np
import pytest
from PIL import ExifTags, Image

from spectralar.demo import upload
from spectralar.demo.upload import PhotoInput, crop_figure, open_photo
from spectralar.interface.image import preprocess_pil


def gradient(width=40, height=20):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 255 - x * 255 // (width - 1)], axis=-1).astype(
        np.uint8
    )


def file_of(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that only says how large it is."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    checked = chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + checked + struct.pack(">I", 9) + b"IDAT"


def photos():
    rgb = Image.fromarray(gradient())
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    yield "jpeg", file_of(rgb, "JPEG")
    yield "quarter turn", file_of(rgb, "JPEG", exif=turned)
    yield "png", file_of(rgb, "PNG")
    yield "alpha", file_of(rgb.convert("RGBA"), "PNG")
    yield "palette", file_of(rgb.quantize(8), "PNG", transparency=0)
    yield "grey", file_of(rgb.convert("L"), "PNG")
    yield "16 bit", file_of(Image.fromarray(np.linspace(0, 65535, 800, dtype=np.uint16).reshape(20, 40)), "PNG")
    yield "cmyk", file_of(rgb.convert("CMYK"), "JPEG")
    yield "float", file_of(Image.fromarray(np.linspace(0, 1, 800, dtype=np.float32).reshape(20, 40)), "TIFF")
    yield "animated", file_of(rgb, "GIF", save_all=True, append_images=[Image.new("RGB", rgb.size)])
    yield "webp", file_of(rgb, "WEBP")


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in photos()])
def test_photos_of_all_kinds(data, tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(data)
    image = open_photo(path)
    assert image.size == (40, 20) and image.info["full_size"] == (40, 20)
    assert preprocess_pil(image, 16, 1).std() > 5  # decoded, and its first frame
    figure = crop_figure(image, 16, 1)
    assert "The middle 20 × 20 of" in figure and "16 × 16 in grey" in figure


def test_crop_counts_a_quarter_turn():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright = open_photo(file_of(Image.fromarray(gradient(40, 20)), "JPEG", exif=exif))
    assert "of 20 × 40 pixels" in crop_figure(upright, 16, 3)


def test_a_square_photo_needs_no_crop():
    figure = crop_figure(Image.fromarray(gradient(30, 30)), 16, 3)
    assert "All of 30 × 30 pixels, seen as 16 × 16 in colour." in figure and "<img" not in figure


def test_large_jpegs_are_decoded_smaller_and_reported_whole():
    image = open_photo(file_of(Image.new("RGB", (4800, 4800), "red"), "JPEG"))
    assert image.size == (1200, 1200) and image.info["full_size"] == (4800, 4800)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"just text, renamed", "not an image that can be read: please send JPEG, PNG"),
        (b"", "not an image"),
        (file_of(Image.fromarray(gradient(200, 200)), "PNG")[:300], "damaged or incomplete"),
        (png_header(20_000, 20_000), "too many pixels|megapixels"),
        (png_header(9_000, 9_000), "9000 x 9000 pixels; please send one of at most 64 megapixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
)
def test_bad_files_get_a_sentence(data, sentence, tmp_path):
    path = tmp_path / "upload.png"
    path.write_bytes(data)
    for file in (path, data):
        with pytest.raises(gr.Error, match=sentence) as caught:
            open_photo(file)
        assert str(caught.value.message).count(". ") == 0 and not caught.value.print_exception


def test_missing_and_oversized_files(tmp_path, monkeypatch):
    with pytest.raises(gr.Error, match="did not arrive"):
        open_photo(tmp_path / "gone.png")
    monkeypatch.setattr(upload, "MAX_FILE_MB", 0.0001)
    with pytest.raises(gr.Error, match="larger than"):
        open_photo(file_of(Image.fromarray(gradient()), "PNG"))


def test_component_takes_files_and_data_urls():
    photo = PhotoInput(type="pil", image_mode=None)
    assert photo.get_block_name() == "image"  # the front end that draws it
    assert photo.get_config()["sources"] == ["upload", "webcam", "clipboard"]
    assert photo.preprocess(None) is None
    data = gr.image_utils.ImageData(url="data:image/png;base64,bm90IGFuIGltYWdl")
    with pytest.raises(gr.Error, match="not an image"):
        photo.preprocess(data)
    with pytest.raises(gr.Error, match="data URL cannot be read"):
        photo.preprocess(gr.image_utils.ImageData(url="data:image/png;base64,%%%"))
