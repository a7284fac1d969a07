"""What the page does not expect: values, files and requests that nobody should send."""

from __future__ import annotations

import io
import json
import math
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .wire import API

SECRET = b"no page may show this"
# The formats that the page takes, then others that Pillow can read and write.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO", "PPM", "TGA", "JPEG2000", "PCX", "SGI", "ICNS",
           "DDS")  # fmt: skip

JSON = {"content-type": "application/json"}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
HTML = b"<!doctype html><script>alert(1)</script>"
TEXTS = (
    "", " ", "\0", "'; DROP TABLE x; --", "<script>alert(1)</script>", "../../../etc/passwd", "file:///etc/passwd",
    "/proc/self/environ", "sample:0:0", "sample:99999999999999999999:1", "sample:1:-1", "sample::", "example:../../x",
    "example:cat", "NaN", "1e999", "٣٤", "9" * 5000, "𝕊𝕡𝕖𝕔𝕥𝕣𝕒𝕝" * 50, "😀\u202e", "\ud83d", "tail", "model", "Bag",
    "1 2 3", "1 " * 3000, "{}", "[]", "data:image/png;base64,AAAA", "http://127.0.0.1:1/x.png", "{image}", "%00%2e/",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3.5, 1e30, -1e30, 1e308, 5e-324, 2**31, 2**63, -(2**63), 10**30, 10**400, math.nan, math.inf,
    -math.inf,
)  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], [[[[[]]]]], [None], [1, 2, 3], [[1, 2], [3]], {"a": 1}, ["Bag"], [[1e30]])


def value(rng: random.Random, depth: int = 0) -> Any:
    """Something that a function may not expect."""
    kind = rng.randrange(20)
    if kind == 0 and depth < 3:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 1 and depth < 3:
        return {rng.choice(("path", "url", "meta", "__type__", "a")): value(rng, depth + 1) for _ in range(2)}
    if kind == 2:
        return file_path(
            rng.choice(("/etc/passwd", "/proc/self/environ", "../secret.txt", "http://127.0.0.1:1/a.png"))
        )
    if kind == 3 and rng.random() < 0.05:
        return "x" * 10_000_000
    return rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS)))


def file_path(path: str) -> dict[str, Any]:
    return {"path": path, "url": None, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}


def broken_image(rng: random.Random) -> tuple[str, bytes]:
    """A file that says it is an image, of any format; cut short, with flipped bits, of another kind, or a bomb."""
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice((("a.svg", SVG), ("a.png", SVG), ("a.html", HTML), ("a.png", HTML), ("a.png", b"")))
    file_format = rng.choice(FORMATS)
    names = ("a.png", f"a.{file_format.lower()}", "a.html", "../a.png", "a" * 300 + ".png", "a\0.png", "é.png")
    data = bytearray(bomb(rng, file_format) if kind == 1 else encoded(rng, file_format))
    if kind in (2, 3):
        data = data[: rng.randrange(len(data))]
    elif kind in (4, 5):
        for _ in range(rng.choice((1, 3, 50))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 6:
        data = polyglot(rng, data)
    elif kind == 7 and rng.random() < 0.02:
        data = data + bytes(41 << 20)  # larger than what may be sent
    return rng.choice(names), bytes(data)


def encoded(rng: random.Random, file_format: str) -> bytes:
    """Noise as an image file."""
    side = rng.choice((1, 7, 40, 200))
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def polyglot(rng: random.Random, image: bytes) -> bytes:
    """An image that is something else too."""
    archive = b"PK\x05\x06" + bytes(18)
    return rng.choice((b"GIF89a" + HTML + image, image + HTML, image + archive, b"%PDF-1.4\n" + image, SVG + image))


def bomb(rng: random.Random, file_format: str) -> bytes:
    """A small file whose header says that the image is huge; of a PNG also one that really holds some of it."""
    side = rng.choice((20_000, 60_000))
    if file_format == "PNG":
        side = rng.choice((side, 2**31 - 1))
        chunks = (
            b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0),
            b"IDAT" + zlib.compress(bytes(300_000)),
        )
        parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (*chunks, b"IEND"))
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    data = bytearray(encoded(rng, file_format))
    if file_format == "TIFF":  # width and height, entries 256 and 257 of the directory, as 32-bit numbers
        for tag in (256, 257):
            at = max(data.find(struct.pack("<HHI", tag, kind, 1)) for kind in (3, 4))
            struct.pack_into("<HHII", data, at, tag, 4, 1, side)
        return bytes(data)
    where = {"GIF": (b"GIF", 6, "<HH"), "BMP": (b"BM", 18, "<ii"), "JPEG": (b"\xff\xc0", 5, ">HH"),
             "WEBP": (b"\x9d\x01\x2a", 3, "<HH"), "AVIF": (b"ispe", 8, ">II")}  # fmt: skip
    if file_format in where:
        mark, offset, kind = where[file_format]
        side = min(side, 16_383) if file_format == "WEBP" else side
        struct.pack_into(kind, data, data.index(mark) + offset, side, side)
    return bytes(data)


def strange_requests(rng: random.Random, url: str, folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, address and options of requests that no browser makes."""
    target = rng.choice(
        ("/etc/passwd", str(folder / "secret.txt"), "/proc/self/environ", "/proc/self/cmdline", "app.py",
         str(folder / "tmp" / "link.txt"), "requirements.txt", "spectralar/demo/page.py", "~/.bashrc",
         "C:/Windows/win.ini")
    )  # fmt: skip
    for way in ("{}", "../../../../..{}", "//{}", "..%2f..%2f..%2f..{}", "%00{}", "file://{}", "./{}", "\\\\host{}"):
        yield "GET", f"{url}{API}file={way.format(target)}", {}
    yield "GET", f"{url}static/../../../../../..{target}", {}
    yield "GET", f"{url}assets/%2e%2e/%2e%2e/%2e%2e{target}", {}
    yield "GET", f"{url}{API}proxy=http://127.0.0.1:1/x", {}
    for path in ("queue/join", "run/predict", "cancel", "upload", "reset", "component_server", "call/generate"):
        body = rng.choice((b"", b"{", b"[]", b"null", b'{"data": [' * 2000, b"\xff\xfe", b'{"data": null}', b'"x"'))
        yield "POST", url + API + path, {"content": body, "headers": JSON}
    for number in (-1, 10**6, 1.5, "x", None):
        body = json.dumps({"data": [], "fn_index": number, "session_hash": rng.choice(("x", "", "../x", "x" * 5000))})
        yield "POST", url + API + rng.choice(("queue/join", "run/predict")), {"content": body, "headers": JSON}
    for session_hash in ("nobody", "", "../x", "x" * 5000, "%00", "'"):
        yield "GET", url + API + "queue/data?session_hash=" + session_hash, {}
    yield rng.choice(("PUT", "DELETE", "PATCH", "OPTIONS")), url + rng.choice(("", "config", API + "upload")), {}
    yield "GET", f"{url}?seed=x&tab=<script>alert(1)</script>&class={'9' * 900}&k=-1", {}
    yield "POST", url + API + "upload", {"content": b"x" * 1000, "headers": {"content-type": "multipart/form-data"}}
