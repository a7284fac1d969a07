"""The figure against latent diffusion: DiT-XL/2 at 256x256 (Peebles & Xie, 2023), random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from .measure import Result, faster, medians
from .models import Shape
from .suite import Figure, Suite

STEPS = (20, 250)
GUIDANCE = 4.0  # DiT's own default


def figures(suite: Suite) -> list[Figure]:
    skip = "minutes; left out of the quick run" if suite.quick and suite.device.type == "cpu" else ""
    setting = f"{suite.large.name}, batch 1, pixels"
    return [Figure("sampling against DiT-XL/2", setting, lambda: against_dit(suite, suite.large), skip)]


def make_dit(device: torch.device, dtype: torch.dtype) -> DiTPipeline:
    """The shapes of facebook/DiT-XL-2-256 and its autoencoder."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=256,
    )  # fmt: skip
    pipeline = DiTPipeline(transformer, vae, DDIMScheduler()).to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def against_dit(suite: Suite, shape: Shape) -> Result:
    """Class to pixels, guided. On a CPU DiT runs one and two steps, and n steps are taken to last as long as the
    first and n - 1 times their difference."""
    ours, dit = suite.models[shape], make_dit(suite.device, suite.models.dtype)

    def run_dit(steps: int) -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        return lambda: dit([1], GUIDANCE, generator, num_inference_steps=steps, output_type="pt")

    measured = (1, 2) if suite.device.type == "cpu" else STEPS
    functions = {str(steps): run_dit(steps) for steps in measured}
    functions["ours"] = lambda: ours(1, generator=torch.Generator().manual_seed(0), output_type="pt")
    samples = suite.time(functions)
    time = {name: value * 1e3 for name, value in medians(samples).items()}
    if measured != STEPS:
        for steps in STEPS:
            time[str(steps)] = time["1"] + (steps - 1) * (time["2"] - time["1"])
    return Result(
        time["ours"],
        "ms an image",
        [faster(time["ours"], f"DiT-XL/2, {steps} steps", time[str(steps)]) for steps in STEPS],
        note="DiT's times scaled up from 1 and 2 steps" if measured != STEPS else "",
        samples=samples,
    )
