"""Draws the examples that are not photographs: python spectralar/demo/examples/draw.py"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent
SIZE = 256


def shirt() -> Image.Image:
    """A T-shirt from the front, light on black as in Fashion-MNIST, but from no data set."""
    side = 4 * SIZE  # drawn large, for smooth edges
    half = [(0.40, 0.10), (0.27, 0.15), (0.11, 0.38), (0.22, 0.47), (0.29, 0.40), (0.29, 0.91)]
    outline = half + [(1 - x, y) for x, y in reversed(half)]
    neck, stripe, hem = (0.39, 0.02, 0.61, 0.19), (0.33, 0.30, 0.67, 0.40), (0.29, 0.87, 0.71, 0.91)
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    draw.polygon([(side * x, side * y) for x, y in outline], fill=190)
    draw.ellipse([side * v for v in neck], fill=0)
    draw.rectangle([side * v for v in stripe], fill=120)
    draw.rectangle([side * v for v in hem], fill=150)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def zone_plate() -> Image.Image:
    """Rings whose frequency grows with their radius: of these a cutoff keeps what lies inside its square."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE
    # At the edges 16 periods an image: the highest frequency of a 32 x 32 grid.
    rings = np.cos(16 * np.pi * (x**2 + y**2))
    return Image.fromarray((127.5 + 127.5 * rings).round().astype(np.uint8))


if __name__ == "__main__":
    shirt().save(FOLDER / "shirt.png", optimize=True)
    zone_plate().save(FOLDER / "zone-plate.png", optimize=True)
