"""What inputs and outputs of the autoregressive model know of the codebook."""

import pytest
import torch
import torch.nn.functional as F

from spectralar.entries import INPUT_SCALE, OUTPUT_SCALE, EntryMaps
from tests.helpers import tiny_tokenizer

K, D, N, WIDTH = 32, 8, 12, 24


@pytest.fixture
def maps() -> EntryMaps:
    maps = EntryMaps(K, D, N, WIDTH).double()
    maps.init_parameters()
    maps.adopt(torch.randn(K, D, dtype=torch.float64), None)
    return maps


def test_inputs_and_logits_are_the_formula(maps):
    tokens, hidden = torch.randint(K, (3, 5)), torch.randn(3, 4, WIDTH, dtype=torch.float64)
    for b in range(3):
        for t in range(5):
            torch.testing.assert_close(maps.embed(tokens)[b, t], maps.inputs[t].T @ maps.entries[tokens[b, t]])
        for t in range(4):
            expected = maps.entries @ (maps.outputs[7 + t] @ hidden[b, t])
            torch.testing.assert_close(maps.logits(hidden, slice(7, 7 + hidden.shape[1]))[b, t], expected)


def test_single_tokens_are_those_of_a_sequence_and_do_not_depend_on_others(maps):
    maps = maps.float()
    tokens, hidden, positions = torch.randint(K, (6,)), torch.randn(6, WIDTH), torch.tensor([0, 11, 3, 3, 5, 0])
    embedded, logits = maps.embed_at(tokens, positions), maps.logits_at(hidden, positions, maps.entries)
    for i, p in enumerate(positions.tolist()):
        alone = slice(i, i + 1)
        assert torch.equal(maps.embed_at(tokens[alone], positions[alone])[0], embedded[i])
        torch.testing.assert_close(maps.embed(tokens[i].expand(1, p + 1))[0, p], embedded[i])
        torch.testing.assert_close(
            maps.logits(hidden[None, alone], slice(p, p + 1))[0, 0], logits[i], rtol=1e-4, atol=1e-5
        )


def test_it_starts_from_what_tokens_add_to_the_picture():
    """Tokens that add something alike to the low frequencies have inputs alike, at whatever positions they stand."""
    tokenizer = tiny_tokenizer(3, spectral_shortcut=True, encoder_layers=0, alpha=0.5)
    maps = EntryMaps(K, D, N, 512)
    maps.init_parameters()
    maps.adopt(tokenizer.quantizer.codebook, tokenizer.shortcut)
    torch.testing.assert_close(maps.entries.norm(dim=1), torch.ones(K))
    for parameter, scale in ((maps.inputs, INPUT_SCALE), (maps.outputs, OUTPUT_SCALE)):
        torch.testing.assert_close(parameter.square().mean(dim=(1, 2)).sqrt(), torch.full((N,), scale))
    added, inputs = [], []
    for t in range(4):
        spectra = torch.zeros(K, 3, 16, 16)
        tokenizer.shortcut.add(spectra, maps.entries, t)
        entries = torch.zeros_like(maps.entries)
        spectra_of_none = torch.zeros(K, 3, 16, 16)
        tokenizer.shortcut.add(spectra_of_none, entries, t)
        added.append(F.normalize((spectra - spectra_of_none)[:, :, :12, :12].flatten(1), dim=1))
        inputs.append(F.normalize(maps.embed(torch.arange(K)[:, None].expand(K, t + 1))[:, t], dim=1))
    added, inputs = torch.cat(added), torch.cat(inputs)
    assert (added @ added.T - inputs @ inputs.T).abs().mean() < 0.05  # a random projection keeps angles


def test_without_a_shortcut_maps_are_random(maps):
    assert maps.inputs.std().item() == pytest.approx(INPUT_SCALE, rel=0.1)
    assert maps.outputs.std().item() == pytest.approx(OUTPUT_SCALE, rel=0.1)
