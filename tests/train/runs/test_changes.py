"""Which settings a run may go on with, which make it another one, and what is said of both."""

import pytest

from train.configs.reading import load_config, save_config
from train.runs.changes import changed_settings, check_changes


def changes(*overrides: str, section: str = "train_tokenizer", before: tuple[str, ...] = ()):
    return changed_settings(
        load_config("fashion-mnist-32", list(before)), load_config("fashion-mnist-32", list(overrides)), section
    )


@pytest.mark.parametrize("change", [
    "train_tokenizer.log_every=7", "train_tokenizer.compile=true", "train_tokenizer.grad_accumulation=2",
    "data.cache=x", "data.root=x", "data.decode=on-the-fly", "data.window=7", "name=x",
    "train_transformer.batch_size=32", "train_classifier.seed=3", "transformer.dropout=0",
])  # fmt: skip
def test_what_changes_no_result_is_not_mentioned(change):
    assert changes(change) == ([], [])


@pytest.mark.parametrize("change", [
    "train_tokenizer.lr=5e-4", "train_tokenizer.steps=20000", "train_tokenizer.mixed_precision=bf16",
    "train_tokenizer.prefix_law=powers", "data.augment=[]", "data.class_balance=sqrt",
])  # fmt: skip
def test_what_may_change_on_the_way_is_told(change):
    told, refused = changes(change)
    key, _, value = change.partition("=")
    assert len(told) == 1 and told[0].startswith(f"{key}=") and not refused


@pytest.mark.parametrize("change", [
    "train_tokenizer.seed=1", "train_tokenizer.batch_size=16", "train_tokenizer.init_from=x", "data.source=x",
    "data.limit=5", "data.eval_split=train", "data.label_column=x", "data.decode=stream", "data.mix.more.source=x",
])  # fmt: skip
def test_other_images_make_another_run(change):
    told, refused = changes(change)
    assert refused and not told
    assert any(text.startswith(change.split("=")[0].removesuffix(".source")) for text in refused)


def test_a_mixture_is_the_tokenizers_alone():
    assert changes("data.mix.more.source=x", section="train_transformer") == ([], [])
    _, refused = changes("data.mix.more.source=x")
    assert refused == ["data.mix.more=unset, not x 0.5 train test image label"]


def test_a_window_counts_where_it_orders_images():
    stream = ("data.decode=stream",)
    _, refused = changes(*stream, "data.window=7", before=stream)
    assert refused == ["data.decode=stream with data.window=8192, not stream with data.window=7"]


def test_another_run_takes_a_flag(tmp_path):
    path = tmp_path / "train_tokenizer" / "config.yaml"
    before = load_config("fashion-mnist-32", ["train_tokenizer.lr=1e-3"])
    save_config(before, path)
    config = load_config("fashion-mnist-32", ["train_tokenizer.seed=1", "train_tokenizer.lr=1e-6"])
    with pytest.raises(ValueError, match="with train_tokenizer.seed=0, not 1 and 60 images, not 61,") as caught:
        check_changes(path, config, 60, 61, allowed=False)
    assert "--allow-changes" in str(caught.value) and "\n" not in str(caught.value)
    said = check_changes(path, config, 60, 61, allowed=True)
    assert said == "train_tokenizer.seed=0, not 1 and 60 images, not 61 and train_tokenizer.lr=0.001, not 1e-06"
    assert check_changes(path, before, 60, 60, allowed=False) == ""


def test_a_configuration_of_another_version_says_nothing(tmp_path):
    path = tmp_path / "train_tokenizer" / "config.yaml"
    path.parent.mkdir()
    path.write_text("data:\n  sauce: x\n")
    assert check_changes(path, load_config("fashion-mnist-32"), 60, 60, allowed=False) == ""
