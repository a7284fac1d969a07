"""The sample bank: kept as far as it is what is asked for, made again where it is not."""

import pytest
import torch

from spectralar import SpectralARPipeline
from tests.helpers import tiny_pipeline
from train.evaluation import sample_bank
from train.runs.engine import make_accelerator
from train.runs.processes import Team


@pytest.fixture
def small_pipe(monkeypatch):
    """A pipeline that counts the images it makes, and shards of 4."""
    monkeypatch.setattr(sample_bank, "SHARD", 4)
    pipe, made = tiny_pipeline(dtype=torch.float32), []
    call = SpectralARPipeline.__call__

    def counting(self, labels, **arguments):
        made.append(len(labels))
        return call(self, labels, **arguments)

    monkeypatch.setattr(SpectralARPipeline, "__call__", counting)
    return pipe, made


def fill(pipe, folder, samples, guidance_scale, seed, **options):
    labels = torch.arange(samples) % 4
    return sample_bank.sample_bank(pipe, folder, labels, guidance_scale, seed, Team(make_accelerator()), **options)


def test_bank_goes_on_where_it_was_and_keeps_what_it_has(small_pipe, tmp_path):
    pipe, made = small_pipe
    first = fill(pipe, tmp_path, 10, 2.0, seed=0)
    assert made == [4, 4, 2]
    again = fill(pipe, tmp_path, 10, 2.0, seed=0)
    fewer = fill(pipe, tmp_path, 5, 2.0, seed=0)
    assert made == [4, 4, 2]  # nothing more
    more = fill(pipe, tmp_path, 13, 2.0, seed=0)
    assert made == [4, 4, 2, 4, 1]  # the one that was not full, and the rest
    assert torch.equal(first, again) and torch.equal(first[:5], fewer) and torch.equal(first, more[:10])


def test_bank_replaces_what_is_damaged_or_of_another_model_or_seed(small_pipe, tmp_path):
    pipe, made = small_pipe
    first = fill(pipe, tmp_path, 8, 2.0, seed=0)
    damaged = sorted(tmp_path.rglob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    again = fill(pipe, tmp_path, 8, 2.0, seed=0)
    assert made == [4, 4, 4] and torch.equal(first, again)
    other = fill(pipe, tmp_path, 8, 2.0, seed=100)
    assert len(made) == 5 and not torch.equal(first, other)
    with torch.no_grad():
        pipe.transformer.head.weight.neg_()
    fill(pipe, tmp_path, 8, 2.0, seed=100)
    assert len(made) == 7
    fill(pipe, tmp_path, 8, 3.0, seed=100)
    assert len(made) == 9
    cold = fill(pipe, tmp_path, 8, 3.0, seed=100, temperature=0.5)
    assert len(made) == 11
    generators = [torch.Generator().manual_seed(100 + i) for i in range(8)]
    arguments = {"guidance_scale": 3.0, "temperature": 0.5, "generator": generators, "output_type": "latent"}
    assert torch.equal(cold, pipe(torch.arange(8) % 4, **arguments).codes)
