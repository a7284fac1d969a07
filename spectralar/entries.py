"""EntryMaps: what the codebook says about tokens, for the inputs and outputs of the autoregressive model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import linear
from .quantizer import at_least_float32
from .shortcut import SpectralShortcut

LOW = 12  # side of the low-pass that maps start from
INPUT_SCALE, OUTPUT_SCALE = 0.7, 0.05  # root mean squares that they start with
EXPECTED_SCALE = 30.0  # of the decoder's word: with it the maps start near the best multiple of 1


class EntryMaps(nn.Module):
    r"""Linear maps, one a position, from codebook entries to inputs and from outputs to codebook entries.

    Codes are numbers; what code j stands for is its entry e_j, and what that does to the picture depends on the
    position t. Besides a row of a table for each code, then,

        input of token t with code j:   I_t^T e_j
        logit of code j for token t:    e_j . O_t h

    so that what is learnt of one code holds for codes nearby. With a spectral shortcut the maps start from what a
    token adds to the picture: I_t e_j is that, and O_t h is h as token t would see it, both in one random projection
    of the low frequencies. Not in the paper.

    With `feedback` there is a third map, from the latent that the tokenizer's decoder expects of token t (see
    `inference.feedback`) to entries: 30 e_j . A_t u_t is added to the logit of code j, A_t = 1 at the start.

    Args:
        codebook_size, codebook_dim: K and d.
        num_tokens: N.
        hidden_size: D.
        feedback: whether the decoder is listened to.
    """

    def __init__(
        self, codebook_size: int, codebook_dim: int, num_tokens: int, hidden_size: int, feedback: bool = False
    ) -> None:
        super().__init__()
        self.expected = None
        if feedback:
            self.expected = nn.Parameter(torch.empty(num_tokens, codebook_dim, codebook_dim))  # A_t
        self.register_buffer("entries", torch.zeros(codebook_size, codebook_dim))  # unit vectors
        self.inputs = nn.Parameter(torch.empty(num_tokens, codebook_dim, hidden_size))  # I_t
        self.outputs = nn.Parameter(torch.empty(num_tokens, codebook_dim, hidden_size))  # O_t

    def init_parameters(self) -> None:
        """Without a tokenizer: random maps, and entries that are all zero."""
        nn.init.normal_(self.inputs, std=INPUT_SCALE)
        nn.init.normal_(self.outputs, std=OUTPUT_SCALE)
        if self.expected is not None:
            identity = torch.eye(self.expected.shape[1], dtype=self.expected.dtype, device=self.expected.device)
            self.expected.copy_(identity.expand_as(self.expected))

    @torch.no_grad()
    def adopt(self, codebook: Tensor, shortcut: SpectralShortcut | None) -> None:
        """Takes over a tokenizer's codebook (K, d) and, if it has a shortcut, what each token adds to the picture."""
        self.entries.copy_(F.normalize(at_least_float32(codebook), dim=-1))
        if shortcut is None:
            return
        low, device = min(LOW, shortcut.image_size), self.inputs.device
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (shortcut.channels * low**2, self.inputs.shape[2])
        projection = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)  # (F, D)
        for t, r in enumerate(shortcut.cutoffs):
            part, side = at_least_float32(shortcut.part(t)), min(r, low)  # (C r r, d - 1)
            spectrum = part.new_zeros(shortcut.channels, low, low, part.shape[1])
            spectrum[:, :side, :side] = part.view(-1, r, r, part.shape[1])[:, :side, :side]
            seen = spectrum.flatten(0, 2).T.to(projection) @ projection  # (d - 1, D)
            self.inputs[t] = at_least_float32(shortcut.gain[t, :-1]).to(seen) @ seen
            self.outputs[t, :-1], self.outputs[t, -1] = seen, 0
        for maps, scale in ((self.inputs, INPUT_SCALE), (self.outputs, OUTPUT_SCALE)):
            maps *= scale / maps.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-6)

    def embed(self, tokens: Tensor) -> Tensor:
        """Inputs of the first T tokens of sequences (B, T): (B, T, D)."""
        return torch.einsum("btd,tde->bte", self.entries[tokens], self.inputs[: tokens.shape[1]])

    def logits(self, hidden: Tensor, positions: slice | Tensor) -> Tensor:
        """Of outputs (B, T, D) for the tokens at T `positions`: (B, T, K)."""
        return torch.einsum("bte,tde->btd", hidden, self.outputs[positions]) @ self.entries.T

    def expected_logits(self, expected: Tensor, positions: slice | Tensor) -> Tensor:
        """What the decoder's expectation (B, T, d) adds to the logits of the tokens at T `positions`: (B, T, K)."""
        maps = self.expected[positions]  # (T, d, d)
        return EXPECTED_SCALE * torch.einsum("bte,tde->btd", expected.to(maps.dtype), maps) @ self.entries.T

    # For one token a sequence, each at its own position (B,). One small product a sequence, whoever is beside it.

    def embed_at(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Inputs of tokens (B,) -> (B, D)."""
        entries = F.embedding(tokens, self.entries).unsqueeze(1)  # (B, 1, d)
        return torch.bmm(entries, self.inputs.index_select(0, position))[:, 0]

    # `entries` (K, d) is the buffer, or that `layers.by_columns`.

    def logits_at(self, hidden: Tensor, position: Tensor, entries: Tensor) -> Tensor:
        """Of outputs (B, D) for the tokens at `position` -> (B, K)."""
        seen = torch.bmm(self.outputs.index_select(0, position), hidden.unsqueeze(2))[:, :, 0]  # (B, d)
        return linear(seen, entries)

    def expected_logits_at(self, expected: Tensor, position: int | Tensor, entries: Tensor) -> Tensor:
        """What expectations (B, d) add to the logits of the tokens at `position`, (B,) or one for all -> (B, K)."""
        maps = self.expected[position].expand(len(expected), -1, -1)  # (B, d, d)
        seen = torch.bmm(maps, expected.to(maps.dtype).unsqueeze(2))[:, :, 0]  # (B, d)
        return EXPECTED_SCALE * linear(seen, entries)
