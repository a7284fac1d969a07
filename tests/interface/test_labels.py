import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralar.interface.labels import LabelNames

ID2LABEL = {"2": "crane", "0": "goldfish, Carassius auratus", "1": "Ankle boot", "3": "Crane, derrick", "10": "bag"}


@pytest.fixture
def names():
    return LabelNames(ID2LABEL, 11)


def test_one_name_is_shown_for_each_class(names):
    named = ["goldfish", "Ankle boot", "crane (2)", "Crane, derrick"]
    assert names.shown == [*named, "4", "5", "6", "7", "8", "9", "bag"]
    assert list(names.id2label) == [0, 1, 2, 3, 10]  # JSON's strings are numbers again, and in their order


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (3, [3]),
        ("goldfish", [0]),
        ("  carassius AURATUS ", [0]),
        ("goldfish, carassius auratus", [0]),
        (["derrick", 4, "BAG"], [3, 4, 10]),
        ([[1], [2, [3]], ("bag",)], [1, 2, 3, 10]),
        (torch.tensor([[1, 2]]), [1, 2]),
        (torch.tensor(5), [5]),
        ([torch.tensor([1]), np.int64(2), np.array([3])], [1, 2, 3]),
        ([], []),
    ],
)
def test_labels_become_ids(names, labels, ids):
    assert names.ids(labels) == ids


def test_unique_names_are_sorted_and_leave_out_shared_ones(names):
    assert list(names.unique.items()) == [
        ("Ankle boot", 1), ("Carassius auratus", 0), ("Crane, derrick", 3), ("bag", 10), ("crane (2)", 2),
        ("derrick", 3), ("goldfish", 0), ("goldfish, Carassius auratus", 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("goldfisch", "no class is named 'goldfisch': did you mean 'goldfish'"),
        ("ANKEL BOOT", "did you mean 'Ankle boot'"),
        ("xyz", "no class is named 'xyz': there are goldfish, Ankle boot, crane .2. and 2 more"),
        ("crane", r"several classes are named 'crane': give one of the ids \[2, 3\]"),
        (11, "between 0 and 10, got 11"),
        (-1, "between 0 and 10, got -1"),
        ([1, [99]], "between 0 and 10, got 99"),
        (1.0, "ids or names, got 1.0"),
        (torch.tensor([1.5]), "ids or names, got 1.5"),
        (True, "ids or names, got True"),
        (None, "ids or names, got None"),
    ],
)
def test_unknown_labels_are_named(names, label, message):
    with pytest.raises(ValueError, match=message):
        names.ids(label)


def test_a_model_without_names_asks_for_ids():
    names = LabelNames(None, 4)
    assert names.shown == ["0", "1", "2", "3"]
    assert names.ids([0, 3]) == [0, 3]
    with pytest.raises(ValueError, match="no class names, so 'cat' is none: give an id between 0 and 3"):
        names.ids("cat")


def test_names_that_share_the_text_before_a_comma_are_told_apart():
    given = {0: "Smith, Anna", 1: "Smith, John", 2: "SMITH", 3: "3", 4: "", 5: "twin", 6: "twin", 8: "7"}
    names = LabelNames(given, 9)
    assert names.shown == [
        "Smith, Anna", "Smith, John", "SMITH (2)", "3", "4", "twin (5)", "twin (6)", "7 (7)", "7",
    ]  # fmt: skip
    assert names.whole == names.shown
    assert names.ids([name for i, name in enumerate(names.shown) if i != 4]) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert LabelNames({0: "cat, tom", 1: "dog"}, 2).whole == ["cat, tom", "dog"]


TEXTS = st.text(st.sampled_from("aA,1 ()"), max_size=8)


@given(st.dictionaries(st.integers(0, 5), TEXTS), st.sampled_from(["shown", "whole"]))
def test_whatever_the_names_those_shown_differ_and_mean_their_class(id2label, which):
    names = LabelNames(id2label, 6)
    shown = getattr(names, which)
    assert len({name.casefold() for name in shown}) == 6 and all(shown)
    for i, name in enumerate(shown):
        assert name == str(i) or names.ids(name) == [i]


def test_names_of_classes_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="between 0 and 3, got 4"):
        LabelNames({4: "cat"}, 4)
