"""Statistics of codes against closed forms, and the file that keeps them."""

import math
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from spectralar.analysis.statistics import (
    STATISTICS_FILE,
    code_marginals,
    code_use,
    next_token_entropy,
    read_statistics,
    write_statistics,
)
from spectralar.inference.feedback import all_logits
from tests.helpers import tiny_transformer


def test_marginals_are_frequencies():
    codes = torch.tensor([[0, 2], [0, 1], [3, 2], [0, 2]])
    expected = [[0.75, 0, 0, 0.25, 0], [0, 0.25, 0.75, 0, 0]]
    assert code_marginals(codes, 5).tolist() == expected


def test_next_token_entropy_of_certain_and_open_models():
    model = tiny_transformer().double()
    logits_of = partial(all_logits, model, None)
    codes = torch.randint(32, (5, 12))
    labels = torch.tensor([0, 1, 2, 3, 0])
    entropy = next_token_entropy(logits_of, codes, labels)
    logits = model(codes[:, :-1], labels)
    expected = torch.distributions.Categorical(logits=logits).entropy().mean(dim=0)
    torch.testing.assert_close(entropy, expected.float())
    torch.testing.assert_close(next_token_entropy(logits_of, codes, labels, batch_size=2), entropy)
    assert entropy.min() > 0.1 and entropy.max() < math.log(32) - 0.1
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    torch.testing.assert_close(next_token_entropy(logits_of, codes, labels), torch.full((12,), math.log(32)))
    nested = next_token_entropy(logits_of, codes, labels, codebook_sizes=[1, 2] + [32] * 10)
    torch.testing.assert_close(nested[:3], torch.tensor([0, math.log(2), math.log(32)]))


def test_code_use():
    use = code_use(torch.tensor([[4, 0, 0, 0], [2, 2, 2, 2], [1, 3, 0, 0]]))
    assert use.used.tolist() == [1, 4, 2]
    expected = [1.0, 4.0, math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))]
    torch.testing.assert_close(use.perplexity, torch.tensor(expected, dtype=torch.float64))


def test_statistics_round_trip(tmp_path):
    assert read_statistics(tmp_path) is None
    codes = torch.randint(9, (50, 4))
    entropy = torch.rand(4)
    path = write_statistics(tmp_path, codes, 9, entropy)
    assert path == tmp_path / STATISTICS_FILE
    statistics = read_statistics(tmp_path)
    assert statistics.code_counts.dtype == torch.int32
    torch.testing.assert_close(statistics.code_counts / 50.0, code_marginals(codes, 9).float())
    assert torch.equal(statistics.next_token_entropy, entropy)


def test_measured_quality_and_its_bound_are_kept_where_they_are_known(tmp_path):
    codes = torch.randint(9, (50, 4))
    write_statistics(tmp_path, codes, 9, torch.rand(4))
    assert (read_statistics(tmp_path).psnr, read_statistics(tmp_path).gaussian_psnr) == (None, None)
    write_statistics(tmp_path, codes, 9, torch.rand(4), [1.0, 2.0, 3.0, 4.5], [2.0, 3.0, 4.0, 5.0])
    statistics = read_statistics(tmp_path)
    assert (statistics.psnr.tolist(), statistics.gaussian_psnr.tolist()) == ([1, 2, 3, 4.5], [2, 3, 4, 5])
    with pytest.raises(ValueError, match=r"gaussian_psnr must be \(4,\), got \(3,\)"):
        write_statistics(tmp_path, codes, 9, torch.rand(4), gaussian_psnr=[1.0, 2.0, 3.0])
    tensors = {"code_counts": torch.zeros(4, 9), "next_token_entropy": torch.zeros(4), "psnr": torch.zeros(3)}
    save_file(tensors, tmp_path / STATISTICS_FILE)
    with pytest.raises(ValueError, match="must hold code_counts"):
        read_statistics(tmp_path)


def test_unfit_statistics(tmp_path):
    with pytest.raises(ValueError, match="between 0 and 8"):
        write_statistics(tmp_path, torch.tensor([[9]]), 9, torch.zeros(1))
    with pytest.raises(ValueError, match=r"got \(5, 4\) and \(3,\)"):
        write_statistics(tmp_path, torch.zeros(5, 4, dtype=torch.long), 9, torch.zeros(3))
    path = tmp_path / STATISTICS_FILE
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="holds no statistics"):
        read_statistics(tmp_path)
    save_file({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no statistics"):
        read_statistics(tmp_path)
    save_file({"code_counts": torch.zeros(4, 9), "next_token_entropy": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"must hold code_counts \(N, K\)"):
        read_statistics(tmp_path)
