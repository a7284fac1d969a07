"""Ranges of settings."""

from train.configs.config import check_config
from train.configs.reading import load_config


def test_what_may_be_zero_may():
    config = load_config("fashion-mnist-32")
    for key in ("warmup_steps", "weight_decay", "grad_clip", "seed"):
        setattr(config.train_tokenizer, key, 0)
    config.transformer.dropout = config.data.limit = 0
    check_config(config)
