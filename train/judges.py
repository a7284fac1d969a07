"""The judge of samples: a trained classifier's features and probabilities, and what is measured in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .classifier import Classifier
from .metrics import frechet_distance, inception_score, manifold_metrics

BATCH = 256


@dataclass
class Judged:
    """What a judge makes of n images, on the CPU."""

    features: Tensor  # (n, d)
    probabilities: Tensor  # (n, K)

    def __len__(self) -> int:
        return len(self.features)

    def first(self, n: int) -> Judged:
        return Judged(self.features[:n], self.probabilities[:n])

    def accuracy(self, labels: Tensor) -> float:
        """Share of the images whose likeliest class is their label (n,)."""
        return float((self.probabilities.argmax(dim=1) == labels.cpu()).double().mean())


def join(parts: list[Judged]) -> Judged:
    return Judged(torch.cat([p.features for p in parts]), torch.cat([p.probabilities for p in parts]))


class Judge:
    """Callable: images (n, C, H, H) in [-1, 1] -> `Judged`. Real and generated ones are all rounded to 8 bits first.

    A generated image that is not rounded would be told from a real one by that alone.
    """

    def __init__(self, classifier: Classifier, device: torch.device) -> None:
        self.classifier, self.device = classifier.to(device), device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Judged:
        parts = []
        for batch in images.split(BATCH):
            features = self.classifier.features(round_to_8_bits(batch.to(self.device).float()))
            parts.append(Judged(features.cpu(), self.classifier.head(features).softmax(dim=1).cpu()))
        return join(parts)


def round_to_8_bits(images: Tensor) -> Tensor:
    """What a PNG file would keep of images in [-1, 1], any shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def compare(real: Judged, fake: Judged, labels: Tensor, manifold_images: int) -> dict[str, float]:
    """All measures of a set of images against real ones.

    Args:
        real: held-out images in random order.
        fake: the images to measure, of classes `labels` (m,), in an order in which the first ones are no other than
            the rest.
        manifold_images: of each set, for precision, recall, density and coverage: they grow or fall with it.

    Returns:
        "images", their number; "fd", over all of both sets; "inception_score" and "accuracy", over all of `fake`;
        "precision", "recall", "density" and "coverage", over the first `manifold_images` of each set.
    """
    return {
        "images": len(fake),
        "fd": frechet_distance(real.features, fake.features),
        "inception_score": inception_score(fake.probabilities),
        "accuracy": fake.accuracy(labels),
        "manifold_images": manifold_images,
        **manifold_metrics(real.first(manifold_images).features, fake.first(manifold_images).features),
    }
