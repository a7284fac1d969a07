"""The command that makes cutoffs of a data set."""

import pytest
import yaml
from PIL import Image

from spectralar.spectral import data_cutoffs, gaussian_psnr
from train.configs.reading import load_config
from train.cutoffs import main
from train.data.images import load_images
from train.data.variances import dct_variances


def test_the_command_prints_the_law_and_its_bound(preset, capsys):
    main([str(preset), "tokenizer.cutoffs=[16,16,16,16]", "tokenizer.codebook_size=64"])  # replaced: it makes new ones
    printed = capsys.readouterr().out
    config = load_config(str(preset))
    variances = dct_variances([load_images(config.data, "train")])
    bits = [6.0, 12.0, 18.0, 24.0]
    cutoffs, bound = data_cutoffs(variances, bits), gaussian_psnr(variances, bits)
    assert f"tokenizer.cutoffs={list(cutoffs)}".replace(" ", "") in printed
    assert f"| 1 | 6 | {cutoffs[0]} | {bound[0]:.2f} | 2 |" in printed
    assert f"| 4 | 24 | 16 | {bound[3]:.2f} | 16 | {bound[3]:.2f} |" in printed
    assert "| 3 |" not in printed
    line = next(line for line in printed.splitlines() if line.startswith("  cutoffs:"))
    assert yaml.safe_load(line) == {"cutoffs": list(cutoffs)}
    assert load_config(str(preset), [printed.split("or behind a command: ")[1].strip()]).tokenizer.cutoffs == list(
        cutoffs
    )


def test_images_that_are_all_alike_are_refused(preset, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.new("L", (16, 16), 90).save(tmp_path / name / f"{i}.png")
    with pytest.raises(SystemExit, match="are alike: there is nothing to spend bits on"):
        main([str(preset), f"data.source={tmp_path}"])
