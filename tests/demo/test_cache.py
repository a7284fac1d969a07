"""Nobody ever gets a part of a file, though equal results share one."""

import os
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

from spectralar.demo.cache import PictureOutput, postprocess_whole, write_whole
from spectralar.demo.export import EXPORTS, export_file
from spectralar.demo.page import build
from spectralar.demo.runs import Settings, stream
from spectralar.demo.upload import PhotoInput

DATA = os.urandom(100_000)


def test_a_reader_keeps_what_is_written_again(tmp_path):
    path = write_whole(DATA, "result.bin", str(tmp_path))
    with open(path, "rb") as reader:
        begin, size = reader.read(10), os.fstat(reader.fileno()).st_size
        assert write_whole(DATA, "result.bin", str(tmp_path)) == path
        assert begin + reader.read() == DATA and size == len(DATA)
        assert os.fstat(reader.fileno()).st_ino != Path(path).stat().st_ino  # another file, not the same one again
    assert [file.name for file in Path(path).parent.iterdir()] == ["result.bin"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = write_whole(DATA, "result.bin", str(tmp_path))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(DATA, "result.bin", str(tmp_path))
    assert Path(path).read_bytes() == DATA and len(list(Path(path).parent.iterdir())) == 1


@pytest.mark.parametrize("component", [PictureOutput, PhotoInput])
def test_pictures_are_written_whole(component, tmp_path):
    output = component(format="png")
    output.GRADIO_CACHE = str(tmp_path)
    image = Image.new("L", (8, 8), 77)
    path = Path(output.postprocess(image).path)
    before = path.stat().st_ino
    with path.open("rb"):  # else the number may be given again
        assert Path(output.postprocess(image).path) == path and path.stat().st_ino != before
    assert Image.open(path).getpixel((3, 3)) == 77 and output.postprocess(None) is None


def test_downloads_are_written_whole(model, tmp_path):
    *_, run = stream(model, Settings("Bag", count=1, num_tokens=model.num_tokens))
    for name in EXPORTS:
        path = Path(export_file(run, name, str(tmp_path)))
        before = path.stat().st_ino
        with path.open("rb"):
            assert Path(export_file(run, name, str(tmp_path))) == path and path.stat().st_ino != before


def test_no_component_of_the_page_writes_pictures_in_place(model):
    page = build(model)
    shown = {output._id for function in page.fns.values() for output in function.outputs}
    pictures = [block for block in page.blocks.values() if isinstance(block, gr.Image) and block._id in shown]
    assert len(pictures) >= 7 and all(type(block).postprocess is postprocess_whole for block in pictures)
