"""The models that come with the project: in which order the page shows them, and what shows them well.

Imports nothing: the command line reads the order before anything slow is loaded.
"""

from __future__ import annotations

from typing import NamedTuple


class Shown(NamedTuple):
    """What the page knows of a model beyond its files.

    Args:
        examples: class names to try; the page opens with the first.
        trained_on: the end of the sentence "The tokenizer was trained on ...".
        guidance_scale, temperature: what its samples look best at, by its card.
    """

    examples: tuple[str, ...]
    trained_on: str
    guidance_scale: float = 2.0
    temperature: float = 1.0


# The first one is shown first. Models that are not named here come behind, in alphabetical order.
EMBEDDED = {
    "products-64": Shown(
        ("handbag", "watch", "sports shoe", "backpack", "cap", "belt", "wallet", "shirt", "sunglasses"),
        "product photos on white and, in equal parts, natural photos of 200 classes",
        guidance_scale=1.8,
        temperature=0.7,
    ),
    "fashion-mnist-32": Shown(
        ("Sneaker", "Bag", "T-shirt/top", "Ankle boot", "Trouser", "Dress", "Coat", "Sandal", "Pullover"),
        "small grey pictures of clothes on black, so other pictures come back as the clothes they resemble most",
    ),
}


def place(name: str) -> tuple[int, str]:
    """Sorts models by name into the page's order."""
    order = list(EMBEDDED)
    return (order.index(name) if name in order else len(order)), name


def shown(name: str) -> Shown:
    """Of a model by its folder's name or Hub id; nothing is known of others."""
    return EMBEDDED.get(name.rpartition("/")[2], Shown((), ""))
