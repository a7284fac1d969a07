"""What tests of the training scripts share: the server that runs them, a tiny preset and its images."""

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.train.scripts import ScriptServer

STAGE = {"batch_size": 8, "steps": 24, "warmup_steps": 4, "ema_decay": 0.9, "log_every": 4, "checkpoint_every": 4,
         "eval_every": 100, "sample_every": 100}  # fmt: skip
PRESET = {
    "name": "tiny",
    "data": {"image_size": 16, "channels": 1, "augment": ["shift"]},
    "tokenizer": {"patch_size": 8, "num_tokens": 4, "codebook_size": 32, "codebook_dim": 4, "hidden_size": 16,
                  "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1},
    "train_tokenizer": {**STAGE, "quantize_from": 4, "revive_after": 3},
    "transformer": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.1},
    "train_transformer": {**STAGE, "copies": 2, "optimizer": "muon"},
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Decoded images go where the tests' other files are, not to the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTRALAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def scripts(own_cache):
    """Runs training scripts: `scripts.run("train_tokenizer", [preset, ...])`."""
    with ScriptServer() as server:
        yield server


@pytest.fixture(scope="session")
def preset(tmp_path_factory):
    """Path of a preset that trains in a second: 16x16 waves, across in one class and down in the other."""
    folder = tmp_path_factory.mktemp("preset")
    random = np.random.default_rng(0)
    for label, name in enumerate(["across", "down"]):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(30):
            wave = 128 + 100 * np.sin(np.arange(16) / random.uniform(1, 4) + random.uniform(0, 6))  # (16,)
            pixels = np.broadcast_to(wave, (16, 16)) + random.normal(0, 5, (16, 16))
            image = Image.fromarray((pixels.T if label else pixels).clip(0, 255).astype(np.uint8))
            image.save(folder / "images" / name / f"{i}.png")
    path = folder / "tiny.yaml"
    data = {**PRESET["data"], "source": str(folder / "images")}
    path.write_text(yaml.safe_dump({**PRESET, "data": data}))
    return path
