"""Tiny models for all tests: random weights from a fixed seed, none of them degenerate."""

import torch

from spectralar import SpectralARPipeline, SpectralARTransformer, SpectralTokenizer

CLASS_NAMES = {0: "T-shirt", 1: "Sneaker, gym shoe", 2: "Bag", 3: "Ankle boot"}


def add_noise(model: torch.nn.Module, scale: float = 0.1, seed: int = 0) -> torch.nn.Module:
    """Moves every weight: layers that start at zero (heads, gates, seam filter) would hide what is behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter))
    return model


def seeded(build, seed: int, noise: float):
    """build() with the global generator at `seed`, plus noise, in eval mode; leaves the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    return add_noise(model, noise, seed + 1).eval()


def tiny_tokenizer(channels: int = 1, image_size: int = 16, seed: int = 0, **config) -> SpectralTokenizer:
    """12 tokens of 32 entries on 16x16 images, two layers a side; `config` overrides."""
    config = {
        "patch_size": 4, "num_tokens": 12, "codebook_size": 32, "codebook_dim": 8, "hidden_size": 32,
        "num_heads": 2, "encoder_layers": 2, "decoder_layers": 2, "mlp_ratio": 2.0, **config,
    }  # fmt: skip
    return seeded(lambda: SpectralTokenizer(image_size=image_size, in_channels=channels, **config), seed, 0.1)


def tiny_transformer(seed: int = 0, **config) -> SpectralARTransformer:
    """4 classes; tokens as in `tiny_tokenizer`; three layers; `config` overrides."""
    config = {
        "num_classes": 4, "codebook_size": 32, "num_tokens": 12, "hidden_size": 32, "num_layers": 3,
        "num_heads": 2, "mlp_ratio": 2.0, **config,
    }  # fmt: skip
    model = seeded(lambda: SpectralARTransformer(**config), seed, 0.15)
    if model.entry_maps is not None:
        shape, generator = model.entry_maps.entries.shape, torch.Generator().manual_seed(seed)
        model.entry_maps.adopt(torch.randn(shape, generator=generator), None)
    return model


def tiny_pipeline(
    channels: int = 1,
    image_size: int = 16,
    dtype: torch.dtype = torch.float64,
    id2label: dict[int, str] | None = CLASS_NAMES,
    seed: int = 0,
    tokenizer: dict | None = None,
    transformer: dict | None = None,
) -> SpectralARPipeline:
    """A pipeline of both, silent. In float64 by default: no tie flips a token when a batch is split.

    `tokenizer` and `transformer` override their configs; num_tokens and codebook_size of the tokenizer hold for both.
    """
    codes = tiny_tokenizer(channels, image_size, seed, **(tokenizer or {}))
    shared = {name: codes.config[name] for name in ("num_tokens", "codebook_size")}
    model = tiny_transformer(seed, **shared, **(transformer or {}))
    for component in (codes, model):
        torch.nn.Module.to(component, dtype)  # diffusers' own `to` warns of every dtype
    pipe = SpectralARPipeline(codes, model, id2label=id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sharing_weights(pipe: SpectralARPipeline) -> SpectralARPipeline:
    """A second pipeline of the same models, with a state of its own; silent."""
    other = SpectralARPipeline(**pipe.components, **pipe.parameters)
    other.set_progress_bar_config(disable=True)
    return other


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def record_steps(monkeypatch) -> list[tuple[int, int]]:
    """Rows and new tokens of each step that the transformer runs from now on."""
    seen = []
    real = SpectralARTransformer.step

    def step(self, tokens, position, conditioning, cache):
        seen.append((conditioning.start.shape[0], 0 if tokens is None else tokens.shape[1]))
        return real(self, tokens, position, conditioning, cache)

    monkeypatch.setattr(SpectralARTransformer, "step", step)
    return seen
