"""Does the model copy? Nearest training images of samples, beside those of images that it cannot have copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .judges import Judged
from .metrics import nearest

NEAREST = 3  # training images shown beside a sample
LEVELS = 101  # quantiles kept, 0 to 100 %


@dataclass
class Looked:
    """A set of n images as pixels and as the judges see it."""

    pixels: Tensor  # (n, C, H, H) uint8
    views: dict[str, Judged]  # by judge

    def first(self, n: int) -> Looked:
        return Looked(self.pixels[:n], {name: judged.first(n) for name, judged in self.views.items()})

    def spaces(self) -> dict[str, Tensor]:
        """Points (n, d) by the name of the space they lie in."""
        return {"pixels": self.pixels.flatten(1), **{name: judged.features for name, judged in self.views.items()}}


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 on the CPU, any shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def find_neighbours(
    samples: Looked, heldout: Looked, rebuilt: Looked, train: Looked
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How near to training images samples are, and held-out images and their reconstructions, in every space.

    A model that copies has samples that are nearer than held-out images are. In pixels blurred images are near to
    everything: there the reconstructions, as blurred as samples, are the measure.

    Returns:
        By space, "samples", "heldout" and "reconstructions": quantiles of the distance to the nearest training image
        at 0, 1, .., 100 % of the images, per pixel a root mean square on [0, 1], else Euclidean; "closer": shares of
        the samples nearer than all but 1 % of the held-out images and of the reconstructions. And by space the
        places (n, 3) of the samples' nearest training images, nearest first.
    """
    found, places = {}, {}
    sets = {name: looked.spaces() for name, looked in (("heldout", heldout), ("reconstructions", rebuilt))}
    among = train.spaces()
    for space, points in samples.spaces().items():
        scale = 255 * points.shape[1] ** 0.5 if space == "pixels" else 1.0
        distance, places[space] = nearest(points, among[space], min(NEAREST, len(among[space])))
        nearests = {"samples": distance[:, 0] / scale}
        nearests |= {name: nearest(spaces[space], among[space])[0][:, 0] / scale for name, spaces in sets.items()}
        found[space] = {
            **{name: _quantiles(values) for name, values in nearests.items()},
            "closer": {
                name: float((nearests["samples"] < nearests[name].quantile(0.01)).double().mean()) for name in sets
            },
        }
        places[f"{space}, closest"] = nearests["samples"].argsort()
    counts = {"samples": len(samples.pixels), "heldout": len(heldout.pixels), "train": len(train.pixels)}
    return {"images": counts, "spaces": found}, places


def _quantiles(values: Tensor) -> list[float]:
    return values.double().quantile(torch.linspace(0, 1, LEVELS, dtype=torch.float64)).tolist()
