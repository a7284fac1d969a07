"""Adversarial loss on full-prefix images: a small PatchGAN, hinge losses, LeCAM regularisation.

    L_D = E[relu(1 - D(x))] + E[relu(1 + D(x'))] + lecam_weight R,   L_G = -E[D(x')],   x' = D_N(x),
    R = E[relu(D(x) - a')²] + E[relu(a - D(x'))²],   a, a' = running means of D(x), D(x').

Hinge losses as in Lim and Ye (2017), R as in Tseng et al. (2021): it keeps the discriminator's answers to
real and reconstructed images from drifting apart, which they do first where data is scarce.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ..configs.config import TokenizerStage
from .losses import GradientShare

LECAM_DECAY = 0.99
LAYERS = 3  # convolutions of stride 2: a logit sees 38 pixels a side


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images (B, C, H, H) in [-1, 1] -> a logit for each patch (B, 1, H / 8, H / 8).

    Group normalisation, not batch normalisation: an answer depends on no batch mate, so on no number of processes.

    Args:
        in_channels: C.
        width: channels of the first layer, a multiple of 8; each later one has twice as many.
    """

    def __init__(self, in_channels: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(LAYERS - 1):
            layers += [
                nn.Conv2d(width, 2 * width, 4, 2, padding=1, bias=False),
                nn.GroupNorm(8, 2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).float()


def discriminator_loss(real: Tensor, fake: Tensor, means: Tensor, lecam_weight: float) -> Tensor:
    """L_D of the logits of real and reconstructed images, any shape; means (2,) = (a, a')."""
    hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    lecam = F.relu(real - means[1]).square().mean() + F.relu(means[0] - fake).square().mean()
    return hinge + lecam_weight * lecam


class AdversarialTerm:
    """The discriminator, its optimiser and the means of its answers, all of them in the checkpoints of the run."""

    def __init__(self, stage: TokenizerStage, in_channels: int, accelerator: Accelerator) -> None:
        self.stage, self.accelerator = stage, accelerator
        self.first_step = stage.adversarial_from
        self.discriminator = PatchDiscriminator(in_channels, stage.discriminator_width)
        optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=stage.discriminator_lr, betas=(0.5, 0.9))
        self.wrapped, self.optimizer = accelerator.prepare(self.discriminator, optimizer)
        self.means = torch.zeros(2, device=accelerator.device)
        self._now = torch.zeros_like(self.means)
        self.share = GradientShare(stage.adversarial_weight, accelerator.device)
        accelerator.register_for_checkpointing(self, self.share)

    def __call__(
        self, frames: Tensor, images: Tensor, lengths: Tensor, error: Tensor, last: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Takes a slice of a step's batch: values to log, and a scalar with the tokenizer's gradient.

        The discriminator's gradients are accumulated on the way, of what it made of the same frames.

        Args:
            frames: (B, 1 + S, C, H, H), the full prefix first.
            images: (B, C, H, H).
            lengths: not used.
            error: scalar, the mean squared error of the full prefix.
            last: whether it is this process's last slice.
        """
        with self.accelerator.autocast():
            # Not the wrapped one: its gradients are not wanted here, which data parallelism would wait for.
            generator = -self.discriminator(frames[:, 0]).mean()
        weighted = self.share(generator, frames, error)
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            with self.accelerator.autocast():
                real, fake = self.wrapped(torch.cat([images, frames[:, 0].detach()])).chunk(2)
            loss = discriminator_loss(real, fake, self.means, self.stage.lecam_weight)
            self.accelerator.backward(loss / self.stage.grad_accumulation)
        means = torch.stack([real.detach().mean(), fake.detach().mean()])
        self._now += means / self.stage.grad_accumulation
        return {"adversarial": generator, "discriminator": loss}, weighted

    def step(self) -> None:
        """Ends a step: moves the discriminator and the running means."""
        self.accelerator.clip_grad_norm_(self.discriminator.parameters(), self.stage.grad_clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        now = self.accelerator.reduce(self._now, "mean")
        self.means = LECAM_DECAY * self.means + (1 - LECAM_DECAY) * now
        self._now = torch.zeros_like(self._now)
        self.share.step(self.accelerator)

    def state_dict(self) -> dict[str, Tensor]:
        return {"means": self.means}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.means = state["means"].to(self.means.device)
