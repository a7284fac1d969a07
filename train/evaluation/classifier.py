"""Classifier: a small residual network, the fixed judge of samples; its features carry the Fréchet distance.

It knows nothing of the models that it judges: it is trained on the images alone, by `train.train_classifier`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "classifier.safetensors", "classifier.json"
SMALLEST_MAP = 4  # pixels a side of the last stage's feature map


class ResidualBlock(nn.Module):
    """y = relu(BN(conv(relu(BN(conv(x))))) + shortcut(x)) (He et al., 2016, basic block)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            # Averaged before the 1x1 convolution, which would otherwise skip three pixels of four.
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Classifier(nn.Module):
    """Residual network over H x H images: a strided stem, then stages that halve the map down to 4 x 4.

    Stage s has `width` * 2^s channels; a linear head reads the mean over the last map, which are the features.
    For H = 32 that is 3 stages and 4 * `width` features, for H = 64 one stage more and twice the features.

    Args:
        image_size: side H of the images, a power of two of at least 8.
        in_channels: C, 1 (grey) or 3 (RGB).
        num_classes: number of classes.
        width: channels of the first stage.
        blocks: residual blocks a stage.

    Raises:
        ValueError: if image_size is no power of two or below 8.
    """

    def __init__(self, image_size: int, in_channels: int, num_classes: int, width: int = 24, blocks: int = 1) -> None:
        super().__init__()
        if image_size < 2 * SMALLEST_MAP or image_size & (image_size - 1):
            raise ValueError(f"the classifier needs images of 8, 16, 32, 64, ... pixels a side, not {image_size}.")
        self.config = dict(
            image_size=image_size, in_channels=in_channels, num_classes=num_classes, width=width, blocks=blocks
        )
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        layers, channels, side = [], width, image_size // 2
        while True:
            for block in range(blocks):
                factor = 2 if layers and block == 0 else 1
                layers.append(ResidualBlock(channels, channels * factor, stride=factor))
                channels *= factor
            if side == SMALLEST_MAP:
                break
            side //= 2
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)
        self.to(memory_format=torch.channels_last)  # twice as fast on CPUs

    @property
    def num_features(self) -> int:
        return self.head.in_features

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, H) in [-1, 1] -> (B, num_features)."""
        return self.views(images)[0]

    def views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, num_features), and the last map of 8 x 8, (B, W, 8, 8); W = 0 for images of 8 pixels."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))  # (B, width, H/2, H/2)
        coarse = x[:, :0]
        for stage in self.stages:
            coarse = x if x.shape[-1] == 2 * SMALLEST_MAP else coarse
            x = stage(x)
        return x.mean(dim=(2, 3)), coarse  # (B, W)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, H) in [-1, 1] -> logits (B, num_classes)."""
        return self.head(self.features(images))


def save_classifier(model: Classifier, folder: Path, *, class_names: list[str], accuracy: float) -> str:
    """Writes classifier.safetensors and classifier.json; returns the weights' SHA-256.

    Args:
        class_names: of the labels 0..num_classes-1.
        accuracy: on held-out images, in 0..1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Plain layout: safetensors keeps no strides.
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    card = {"architecture": model.config, "class_names": class_names, "accuracy": accuracy, "sha256": sha256}
    (folder / CONFIG).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return sha256


def load_classifier(folder: str | os.PathLike) -> tuple[Classifier, dict]:
    """The finished classifier of a folder, in evaluation mode, and what classifier.json says of it.

    Raises:
        ValueError: if there is none, or its weights are not those that the JSON file has the hash of.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"There is no trained classifier in {folder}: run train.train_classifier to its end first.")
    card = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if sha256 != card["sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS} has the SHA-256 {sha256[:12]}... and {CONFIG} names {card['sha256'][:12]}...: "
            "one of the two was changed; train the classifier again."
        )
    model = Classifier(**card["architecture"])
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval().requires_grad_(False), card
