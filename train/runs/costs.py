"""Operations and memory of an image in training, by formula; `train.plan` makes hours and gibibytes of them.

Convention: an addition of a product is two operations; attention counts all T² pairs, and its backward pass 2.5 times
the forward one, since fused kernels compute the scores again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectralar.quantizer import VectorQuantizer
from spectralar.tokenizer import SpectralTokenizer
from spectralar.transformer import SpectralARTransformer

from ..configs.config import Config

# Operations of one pass at 224 x 224, as far as the losses look into the network.
PERCEPTUAL_FLOPS = {"efficientnet-lite0": 0.487e9, "lpips-vgg": 30.7e9}


@dataclass
class Flops:
    """Operations of one image's forward pass, by what their backward pass takes."""

    products: float = 0  # two products as large: the gradients of both factors
    halves: float = 0  # one: the other factor needs no gradient
    constants: float = 0  # none
    attention: float = 0  # 2.5 times

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(factor * value for value in vars(self).values()))

    @property
    def forward(self) -> float:
        return self.products + self.halves + self.constants + self.attention

    @property
    def training(self) -> float:
        return 3 * self.products + 2 * self.halves + self.constants + 3.5 * self.attention


def block_flops(rows: int, keys: int, width: int, inner: int) -> Flops:
    """A transformer block over `rows` tokens of which each sees `keys`: 2 rows (4 D² + 2 D inner) + 4 rows keys D."""
    return Flops(products=2 * rows * (4 * width**2 + 2 * width * inner), attention=4 * rows * keys * width)


class TokenizerCost:
    """Costs of an image in stage 1. P patches, N tokens, S frames (1 + sampled prefixes), D width, H side.

    forward = encoder blocks over P + N tokens, decoder blocks over N spectral tokens, once, and over P mask tokens a
    frame, which also see the N; patches in (2 P p² C D) and out, code look-up (2 N d K), seam convolutions, and the
    products with H x H matrices that limit frames and targets to their band.

    A spectral shortcut adds the transform of the image and of what each frame starts from, that start's patches in,
    and a product with B_k (2 C r_k² (d - 1)) a token for its latent, and for its part of the spectrum once when
    codes are found and once when they are decoded.

    Args:
        model: the tokenizer.
        frames: S.
        tokens: those that are decoded, N by default.
    """

    def __init__(self, model: SpectralTokenizer, frames: int, tokens: int | None = None) -> None:
        c = model.config
        self.model, self.frames = model, frames
        self.width, self.inner = c.hidden_size, int(c.hidden_size * c.mlp_ratio)
        self.patches, self.tokens = model.num_patches, c.num_tokens if tokens is None else tokens
        self.patch_dim, self.latent_dim = c.in_channels * c.patch_size**2, c.codebook_dim
        self.side, self.channels = c.image_size, c.in_channels
        self.transform = 2 * 2 * self.side * self.channels * self.side**2  # of an image, or its band limit

    def analysis(self, token: int) -> float:
        """Of what is missing in the band to the latent of a token, in 0..N-1."""
        return 2 * self.channels * self.model.cutoffs[token] ** 2 * (self.latent_dim - 1)

    def synthesis(self, count: int) -> float:
        """Of the spectrum of the first so many tokens."""
        d = self.latent_dim
        return sum(self.analysis(token) + 2 * d * (d - 1) for token in range(count))

    def encoder_blocks(self) -> Flops:
        length = self.patches + self.tokens
        return block_flops(length, length, self.width, self.inner) * self.model.config.encoder_layers

    def recomputed(self) -> float:
        """Of the blocks' forward pass, which checkpointing does again up to the last product of each."""
        c = self.model.config
        rows = c.encoder_layers * (self.patches + self.tokens) + (c.decoder_layers - 1) * self.tokens
        rows += c.decoder_layers * self.frames * self.patches
        last = 2 * self.width * (rows * self.inner + self.tokens * 3 * self.width)
        return (self.encoder_blocks() + self.decoder_blocks()).forward - last

    def encoder(self) -> Flops:
        c, n, flops, lookup = self.model.config, self.tokens, self.encoder_blocks(), 0
        if c.encoder_layers:
            flops += Flops(halves=2 * self.patches * self.patch_dim * self.width)
            flops += Flops(products=2 * n * self.width * self.latent_dim)
        if isinstance(self.model.quantizer, VectorQuantizer):
            lookup = 2 * self.latent_dim * c.codebook_size
        if self.model.shortcut is not None:  # each token but the last is looked up for the next, too
            found = sum(map(self.analysis, range(n))) + self.synthesis(n - 1) + lookup * (n - 1)
            flops += Flops(constants=self.transform + found)
        return flops + Flops(constants=lookup * n)

    def decoder_blocks(self) -> Flops:
        layers, n, width = self.model.config.decoder_layers, self.tokens, self.width
        tokens = block_flops(n, n, width, self.inner) * (layers - 1) + Flops(products=2 * n * 3 * width**2)
        masks = block_flops(self.patches, self.patches + n, width, self.inner) * layers
        if self.model.shortcut is None:  # then the first layer's q k v are computed once a batch
            masks += Flops(products=-2 * self.patches * 3 * width**2)
        return tokens + masks * self.frames

    def decoder(self) -> Flops:
        pixels = self.channels * self.side**2
        # What the latents are multiplied with: a weight, or a matrix that is given. Without an encoder they get no
        # gradient.
        weight, given = Flops(products=1), Flops(halves=1)
        if not self.model.config.encoder_layers:
            weight, given = Flops(halves=1), Flops(constants=1)
        frame = Flops(
            products=2 * pixels * self.width + 2 * 2 * 9 * 16 * pixels,  # to pixels, and the two seam convolutions
            halves=self.transform,  # the band limit
        )
        flops = self.decoder_blocks() + weight * (2 * self.tokens * self.latent_dim * self.width)
        if self.model.shortcut is not None:
            frame += given * self.transform + weight * (2 * pixels * self.width)
            flops += given * self.synthesis(self.tokens)
        return flops + frame * self.frames

    def targets(self) -> Flops:
        """The low-passes of the image for all frames but the full prefix; and each frame's and target's matrix."""
        matrices = 2 * self.side**3 * (2 * self.frames - 1)
        return Flops(constants=self.transform * (self.frames - 1) + matrices)

    def activations(self, half: bool, checkpointing: bool) -> float:
        """Bytes kept for the backward pass. A block keeps the two inputs of its norms in float32, and (6 + 2 r) D a
        token in the products' type: both normed inputs, q k v, what was attended to, twice the inner width."""
        c, size = self.model.config, 2 if half else 4
        full = self.width * (2 * 4 + 6 * size) + 2 * self.inner * size  # bytes a token and layer
        rows = self.patches + self.tokens
        shared = 2 * size * self.width * rows  # a frame's keys and values with those of the spectral tokens
        # Of a frame: both seam convolutions and a gradient, the band limit, frame, target, difference.
        pixels = self.frames * self.side**2 * (16 * (2 * size + 4) + 4 * (4 * self.channels + 1))
        if checkpointing:
            inputs = 4 * self.width * (c.encoder_layers * rows + c.decoder_layers * self.frames * self.patches)
            pairs = c.decoder_layers * self.tokens * self.width * (4 + 3 * size)
            layer = self.frames * (full * self.patches + shared)
            return inputs + pairs + (max(full * rows, layer) if c.encoder_layers else layer) + pixels
        if self.model.shortcut is not None:  # what a frame starts from: spectrum, image, patches, and a gradient
            pixels += self.frames * self.side**2 * 4 * 4 * self.channels
        layers = c.encoder_layers * full * rows + (c.decoder_layers - 1) * full * self.tokens
        return layers + c.decoder_layers * self.frames * (full * self.patches + shared) + pixels


class FeedbackCost:
    """Costs of an image in stage 2 by its decoder feedback at some positions: a frame for each but the first, of the
    tokens before the last; a frame's transform, and the latent of the token behind it. There is no backward pass."""

    def __init__(self, model: SpectralTokenizer, positions: Sequence[int]) -> None:
        self.positions = [k for k in positions if k]
        self.tokenizer = TokenizerCost(model, len(self.positions), max(positions))

    def flops(self) -> float:
        cost = self.tokenizer
        return cost.decoder().forward + sum(cost.transform + cost.analysis(k) for k in self.positions)

    def memory(self, half: bool) -> float:
        """Bytes at most at once: in a block, what its MLP holds, q k v, and the keys and values with those of the
        tokens; at the end, the seam convolutions' 32 channels. Beside them images and spectra."""
        cost, size = self.tokenizer, 2 if half else 4
        block = cost.patches * (cost.width * (2 * 4 + 3 * size) + 2 * cost.inner * size)
        block += 2 * size * cost.width * (cost.patches + cost.tokens) + 4 * 3 * cost.channels * cost.side**2
        end = cost.side**2 * (32 * size + 4 * 6 * cost.channels)
        pairs = 2 * size * cost.model.config.decoder_layers * cost.tokens * cost.width
        return cost.frames * max(block, end) + pairs


class TransformerCost:
    """Costs of an image in stage 2: L blocks over N tokens, adaLN (12 rows D², once an image), head (2 T D K).

    Entry maps add 2 N d D for inputs and 2 T (D d + d K) for logits, decoder feedback 2 T (d² + d K).

    Args:
        model: the transformer.
        positions: T, those whose logits are computed, N by default.
    """

    def __init__(self, model: SpectralARTransformer, positions: int | None = None) -> None:
        self.model, self.config = model, model.config
        self.positions = positions or model.config.num_tokens
        self.width = self.config.hidden_size
        self.inner = int(self.width * self.config.mlp_ratio)

    def blocks(self) -> Flops:
        n = self.config.num_tokens
        return block_flops(n, n, self.width, self.inner) * self.config.num_layers

    def all(self) -> Flops:
        c, d, rows = self.config, self.config.codebook_dim, self.positions
        condition = 2 * self.width * (self.model.adaln.out_features + 2 * self.width)
        flops = self.blocks() + Flops(products=condition + 2 * rows * self.width * c.codebook_size)
        if d:  # entries are given
            entries = Flops(halves=2 * rows * d * c.codebook_size)
            flops += Flops(halves=2 * (c.num_tokens - 1) * d * self.width) + entries
            flops += Flops(products=2 * rows * self.width * d)
            if c.decoder_feedback:
                flops += Flops(halves=2 * rows * d**2) + entries
        return flops

    def activations(self, half: bool, checkpointing: bool) -> float:
        """Bytes kept for the backward pass. A block keeps 4 D a token in float32 (the inputs of its norms and their
        outputs) and (11 + 2 r) D in the products' type; the head keeps T K probabilities and passes two copies."""
        c, size = self.config, 2 if half else 4
        full = self.width * (4 * 4 + 11 * size) + 2 * self.inner * size  # bytes a token and layer
        if half:
            full += 2 * 4 * self.width  # queries and keys in float32, for their norms
        if c.dropout:
            full += 2 * self.width  # one byte for each number that may be dropped
        head = self.positions * (3 * 4 * c.codebook_size + self.width * (2 * 4 + size))
        adaln = 6 * self.width * size * c.num_layers
        layers = 4 * self.width * c.num_layers + full if checkpointing else full * c.num_layers
        return c.num_tokens * layers + adaln + head


def extra_flops(config: Config) -> float:
    """Of an image, by the networks that judge it in stage 1.

    Perceptual: three passes (target, frame, its gradient) for the full prefix and at most one sampled one.
    Adversarial: of the discriminator, two passes for the tokenizer, and three each for image and frame to train it.
    """
    stage, data, flops = config.train_tokenizer, config.data, 0.0
    if stage.perceptual:
        small = stage.perceptual == "efficientnet-lite0"
        side = max(data.image_size, stage.perceptual_size) if small else data.image_size
        frames = 2 if stage.prefixes_per_step else 1
        flops += 3 * frames * PERCEPTUAL_FLOPS[stage.perceptual] * (side / 224) ** 2
    if stage.adversarial:
        w, pixels = stage.discriminator_width, data.image_size**2
        layers = 16 * data.channels * w / 4 + 16 * 2 * w**2 / 16 + 16 * 8 * w**2 / 64 + 9 * 4 * w / 64
        flops += 8 * 2 * layers * pixels
    return flops
