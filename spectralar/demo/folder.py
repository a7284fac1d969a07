"""What lies in a model's folder beside its weights: statistics of its codes, and the model card."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from ..analysis.statistics import Statistics, read_statistics
from .model import Model

CARD = "README.md"
IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
MAX_IMAGE_BYTES = 3_000_000
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)[^)]*\)")
CODE_OR_FILE_LINK = re.compile(r"```.*?```|`[^`\n]*`|(?<!!)\[([^\]]*)\]\((?![a-z]+:|#)[^)]*\)", re.I | re.S)


def model_folder(model: Model) -> Path | None:
    """Where the model was loaded from, also if it came from the Hub; None for one made in memory."""
    folder = model.pipe.name_or_path
    return Path(folder) if folder and Path(folder).is_dir() else None


def model_statistics(model: Model) -> Statistics | None:
    """What is stored about the model's codes, if it fits the model."""
    folder = model_folder(model)
    statistics = None if folder is None else read_statistics(folder)
    fits = statistics is not None and statistics.code_counts.shape == (model.num_tokens, model.codebook_size)
    return statistics if fits else None


def cutoff_law(model: Model) -> str:
    """Where the model's cutoffs come from."""
    config = model.pipe.tokenizer.config
    if not config.cutoffs:
        return f"by alpha = {config.alpha:g}"
    first = ", ".join(map(str, model.cutoffs[:4]))
    return f"a list of its own, such as reverse water-filling gives: {first}, .. {model.cutoffs[-1]}"


def beside_the_bound(model: Model) -> str:
    """PSNR of some prefix lengths on held-out images and the Gaussian bound; "" where they are not known."""
    statistics = model_statistics(model)
    if statistics is None or statistics.psnr is None or statistics.gaussian_psnr is None:
        return ""
    n = model.num_tokens
    lengths = sorted({1, max(1, n // 8), n})
    values = [f"{statistics.psnr[k - 1]:.1f} / {statistics.gaussian_psnr[k - 1]:.1f} dB at k = {k}" for k in lengths]
    return ", ".join(values)


def model_card(folder: Path | None) -> str | None:
    """The model card as Markdown, with the folder's own images in it as data URLs; None where there is no card.

    Images from elsewhere are left out: the page asks no other host for anything. So are links to files, which lie
    beside the card in a repository and not beside the page; their text stays.
    """
    if folder is None or not (folder / CARD).is_file():
        return None
    text = FRONT_MATTER.sub("", (folder / CARD).read_text(encoding="utf-8"))

    def embedded(match: re.Match[str]) -> str:
        alt, name = match.groups()
        path = (folder / name).resolve()
        inside = path.is_relative_to(folder.resolve()) and path.is_file()
        if not inside or path.suffix.lower() not in IMAGE_TYPES or path.stat().st_size > MAX_IMAGE_BYTES:
            return alt
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        return f"![{alt}](data:{IMAGE_TYPES[path.suffix.lower()]};base64,{data})"

    text = CODE_OR_FILE_LINK.sub(lambda match: match[0] if match[1] is None else match[1], text)
    return IMAGE.sub(embedded, text).strip()
