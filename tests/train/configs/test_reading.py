"""Presets, overrides, and what is said about a wrong one."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.configs.config import Config, config_to_dict, flatten
from train.configs.reading import available_presets, load_config, save_config

SECTIONS = ", ".join(field.name for field in dataclasses.fields(Config) if field.name != "name")


def test_fashion_mnist_preset_is_grey_padded_and_never_flipped():
    config = load_config("fashion-mnist-32")
    assert config.data.source == "fashion-mnist"
    assert (config.data.image_size, config.data.channels) == (32, 1)
    assert "flip" not in config.data.augment  # shoes face one way


@pytest.mark.parametrize("preset", available_presets())
def test_every_preset_loads(preset):
    assert load_config(preset).name == preset


def test_overrides_are_typed_and_the_last_one_counts():
    overrides = ["train_tokenizer.lr=5e-4", "data.augment=[flip,crop]", "train_tokenizer.compile=true"]
    config = load_config("fashion-mnist-32", [*overrides, "train_tokenizer.lr=1e-3"])
    assert config.train_tokenizer.lr == 1e-3
    assert config.data.augment == ["flip", "crop"]
    assert config.train_tokenizer.compile is True
    assert config.train_transformer.compile is False


TEXTS = ["", "X/my #1 photos", "a: b", "[x]", "{x}", "007", "1e3", "1_000", "1.50", "0x10", "yes", "No", "null", "~",
         "'q'", '"', "- a", "a=b", " b ", "${data.root}", "\\${x}", "1:30", "2001-01-01", "!!str x", "&a", "*a", "%",
         "@", "`", "é\udcff"]  # fmt: skip


KEYS = ("name", "data.root", "data.train_split", "data.class_names", "data.cache", "train_tokenizer.init_from",
        "data.mix.more.source", "data.mix.more.label_column")  # fmt: skip


def check_literal(texts: list[str], folder) -> None:
    """Texts as values of some settings: taken as they are, followed by those that follow them, and saved."""
    given_texts = dict(zip(KEYS, texts, strict=False))
    config = load_config("fashion-mnist-32", [f"{key}={text}" for key, text in given_texts.items()])
    found = flatten(config_to_dict(config))
    assert {key: found[key] for key in given_texts} == given_texts
    if config.data.mix:
        assert config.data.mix["more"].train_split == config.data.train_split
    save_config(config, folder / "config.yaml")
    assert load_config(str(folder / "config.yaml")) == config


@pytest.mark.parametrize("start", range(0, len(TEXTS), 6))
def test_text_is_taken_literally_and_survives_a_file(tmp_path, start):
    check_literal(TEXTS[start : start + 6], tmp_path)


TEXT = st.text(st.characters(exclude_characters="\0") | st.sampled_from("\\${}[]:#'"), min_size=1, max_size=30)


@given(texts=st.lists(TEXT, min_size=len(KEYS), max_size=len(KEYS)))
@settings(deadline=None, max_examples=10)
def test_any_text_is_taken_literally_and_survives_a_file(tmp_path_factory, texts):
    check_literal(texts, tmp_path_factory.getbasetemp())


def test_text_in_a_file_needs_no_quotes_to_be_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: 007\ndata:\n  root: no\n  cache: 1e3\n  label_column: 1_000 # not 1000\n  class_names:\n"
                    "  image_column: '${x}'\n  limit: 010\n")  # fmt: skip
    config = load_config(str(path))
    data = config.data
    texts = (config.name, data.root, data.cache, data.label_column, data.class_names, data.image_column)
    assert texts == ("007", "no", "1e3", "1_000", "", "${x}")
    assert data.limit == 10  # as written, not in eights


def test_numbers_and_lists_are_parsed():
    overrides = ["data.limit=010", "train_tokenizer.steps=1_000", "train_tokenizer.lr=1e-3", "transformer.dropout=0",
                 "tokenizer.codebook_sizes=[08, 16]", "data.augment=[]", "train_tokenizer.compile=Yes"]  # fmt: skip
    config = load_config("fashion-mnist-32", overrides)
    assert (config.data.limit, config.train_tokenizer.steps, config.train_tokenizer.lr) == (10, 1000, 1e-3)
    assert config.tokenizer.codebook_sizes == [8, 16] and config.train_tokenizer.compile is True
    assert config.data.augment == load_config("fashion-mnist-32", ["data.augment="]).data.augment == []


def test_a_documented_default_comes_back_with_an_empty_value():
    for key in ("class_names", "cache", "root"):
        config = load_config("tiny-imagenet-64", [f"data.{key}=x", f"data.{key}="])
        assert getattr(config.data, key) == getattr(Config().data, key) == ""


def test_no_is_a_name_where_names_are_taken():
    config = load_config("tiny-imagenet-64", ["train_tokenizer.mixed_precision=no", "train_tokenizer.compile=no"])
    assert config.train_tokenizer.mixed_precision == "no"
    assert config.train_tokenizer.compile is False


def test_tokenizer_follows_the_data():
    config = load_config("fashion-mnist-32", ["data.image_size=64", "data.channels=3"])
    assert (config.tokenizer.image_size, config.tokenizer.in_channels) == (64, 3)


def test_a_list_of_cutoffs_and_alpha_are_two_laws():
    rising = "tokenizer.cutoffs=[4,6,9,32]"
    config = load_config("fashion-mnist-32", ["tokenizer.num_tokens=4", rising])
    assert config.tokenizer.cutoffs == [4, 6, 9, 32]
    with pytest.raises(ValueError, match=r"alpha has no effect .* set tokenizer.cutoffs=\[\] too"):
        load_config("fashion-mnist-32", ["tokenizer.num_tokens=4", rising, "tokenizer.alpha=1"])
    config = load_config(
        "fashion-mnist-32", ["tokenizer.num_tokens=4", rising, "tokenizer.alpha=1", "tokenizer.cutoffs=[]"]
    )
    assert (config.tokenizer.cutoffs, config.tokenizer.alpha) == ([], 1.0)


@pytest.mark.parametrize("cutoffs, said", [
    ("[4,32]", "one number for each of the 4 tokens, got 2"), ("[4,6,9,30]", "the last one 32"),
    ("[6,4,9,32]", "none below the one before it"),
])  # fmt: skip
def test_cutoffs_that_do_not_fit_are_refused_at_once(cutoffs, said):
    with pytest.raises(ValueError, match=rf"^tokenizer.cutoffs .*{said}.*train.cutoffs computes them"):
        load_config("fashion-mnist-32", ["tokenizer.num_tokens=4", f"tokenizer.cutoffs={cutoffs}"])


def test_preset_may_be_any_file_and_sets_only_what_differs(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ndata:\n  image_size: 64\n")
    config = load_config(str(path), ["name=yours"])
    expected = Config(name="yours")
    expected.data.image_size = config.tokenizer.image_size = 64
    assert config.data == expected.data
    assert config.name == "yours"


def test_saved_config_loads_equal(tmp_path):
    config = load_config("fashion-mnist-32", ["data.limit=7", "train_tokenizer.lr=3e-5", "data.root=a b #c"])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(str(tmp_path / "run" / "config.yaml")) == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_config_to_dict_goes_through_json():
    config = load_config("fashion-mnist-32")
    tree = json.loads(json.dumps(config_to_dict(config)))
    assert tree["data"]["augment"] == ["shift"]
    assert set(tree) == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("train_tokenizer.lrr=1", "did you mean train_tokenizer.lr?"),
        ("transformer.droput=0", "did you mean transformer.dropout?"),
        ("train_tokenizer.warmup=1", "did you mean train_tokenizer.warmup_steps?"),
        ("tokenizer.lr=1", "did you mean train_tokenizer.lr or train_classifier.lr?"),
        ("image_size=64", "did you mean data.image_size or tokenizer.image_size?"),
        ("data=64", "is a section: set one of data.source, "),
        ("data.root.path=here", "did you mean data.root?"),
        ("zzz.zzz=1", f"the sections are {SECTIONS}."),
    ],
)
def test_wrong_key_names_the_right_one(override, suggestion):
    with pytest.raises(ValueError) as caught:
        load_config("fashion-mnist-32", [override])
    assert suggestion in str(caught.value)
    assert override in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.image_size=big", "data.image_size, which takes int"),
        ("data.image_size=1.5", "data.image_size, which takes int"),
        ("data.augment=flip", "data.augment=[a,b]"),
        ("train_tokenizer.compile=perhaps", "train_tokenizer.compile, which takes bool"),
        ("data.augment=[flop]", "'flip', 'shift', 'crop', 'scale', 'color'; 'flop' is none of them"),
        ("train_transformer.mixed_precision=fp8", "'no', 'bf16', 'fp16'; 'fp8' is none of them"),
        ("train_transformer.codes=later", "train_transformer.codes"),
        ("data.channels=2", "data.channels takes 1, 3"),
        ("train_tokenizer.lr=0", "train_tokenizer.lr must be above 0"),
        ("train_tokenizer.lr=nan", "train_tokenizer.lr must be above 0"),
        ("train_tokenizer.warmup_steps=-1", "train_tokenizer.warmup_steps must be 0 or more"),
        ("transformer.dropout=1.5", "transformer.dropout must lie between 0 and 1"),
        ("tokenizer.num_heads=5", "tokenizer.num_heads=5 does not divide tokenizer.hidden_size="),
        ("data.image_size=31", "does not divide data.image_size=31"),
        ("train_tokenizer.grad_accumulation=999", "does not divide train_tokenizer.batch_size="),
        ("tokenizer.image_size=64", "follow data.image_size"),
        ("train_tokenizer.lr", "is not key=value"),
        ("data.augment=[flip", "cannot be read"),
        ("tokenizer.codebook_sizes=[8,many]", "tokenizer.codebook_sizes, which takes list[int]"),
        ("train_tokenizer.steps=1.5e3", "train_tokenizer.steps, which takes int"),
        ("data.limit=1:30", "data.limit, which takes int"),
        ("data.limit=", "data.limit, which takes int"),
        ("train_tokenizer.steps=${nowhere}", "'nowhere' not found"),
    ],
)
def test_wrong_value_is_one_sentence_that_names_the_key(override, named):
    with pytest.raises(ValueError) as caught:
        load_config("fashion-mnist-32", [override])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="no preset 'fashion'.*fashion-mnist-32"):
        load_config("fashion")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("- 1\n", "sections"),
        ("data: {\n", "not a valid YAML"),
        ("dta:\n  limit: 3\n", "mean data.limit"),
        ("data:\n  limit: 3\n  limit: 4\n", "'limit' stands there twice"),
        ("data:\n  limit:\n", "data.limit, which takes"),
    ],
)
def test_wrong_preset_file_is_named(tmp_path, content, named):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=named) as caught:
        load_config(str(path))
    assert "mine.yaml" in str(caught.value)
