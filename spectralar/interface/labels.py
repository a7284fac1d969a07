"""Class labels: ids and names, as they come from a person -> class ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import chain, count
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from ..checks import integer, odd_kind, shown

ClassLabels = int | str | Tensor | np.ndarray | Sequence["ClassLabels"]


def _by_id(id2label: Any) -> dict[int, str]:
    """Names by class id, in the order of the ids; a ValueError if it is something else."""
    if id2label is not None and not isinstance(id2label, Mapping):
        raise ValueError(f"id2label must be a dict of class ids and names, got {shown(id2label)}.")
    names = {}
    for key, name in (id2label or {}).items():
        is_id = isinstance(key, Integral) and not isinstance(key, bool)  # else a string of one, as in JSON
        if not (is_id or (isinstance(key, str) and key.strip().isdecimal())) or not isinstance(name, str):
            raise ValueError(f"id2label must be a dict of class ids and names, got {shown({key: name})}.")
        names[int(key)] = name
    return dict(sorted(names.items()))


class LabelNames:
    """The names of a model's classes, and the way back from a name to its class.

    Args:
        id2label: names by class id. One name, or several with commas between: the first is shown, all are
            understood, and so is the whole. Ids may be strings, as JSON has them. None: the model has no names.
        num_classes: ids are 0..num_classes-1. None: up to the largest that has a name.

    Attributes:
        shown: one short name a class, in the order of the ids: the first, or the whole where others have the first
            too, or that with the id behind it; the id alone where there is none. All differ, all are understood.
        whole: the same with all names of a class.
        unique: class ids by every name that is that of one class. What is changed in it is heeded.

    Raises:
        ValueError: if an id is none of these.
    """

    def __init__(self, id2label: Mapping[int | str, str] | None, num_classes: int | None) -> None:
        self.id2label = _by_id(id2label)
        self.num_classes = max(self.id2label, default=-1) + 1 if num_classes is None else num_classes
        try:
            for i in self.id2label:
                self._checked(i)
        except ValueError as error:
            raise ValueError(f"id2label does not fit the model: {error}") from None
        self._ids: dict[str, set[int]] = {}  # by name, case folded
        pairs = [(name.strip(), i) for i, value in self.id2label.items() for name in (value, *value.split(","))]
        for name, i in pairs:
            self._ids.setdefault(name.casefold(), set()).add(i)
        # No two classes are shown under one name: the first of "Smith, Anna" and "Smith, John" is that of both.
        texts = [self.id2label.get(i, "").strip() for i in range(self.num_classes)]
        self.shown = [self._told_apart(i, text.split(",")[0].strip(), text) for i, text in enumerate(texts)]
        self.whole = [self._told_apart(i, text) for i, text in enumerate(texts)]
        pairs += [(name, i) for names in (self.shown, self.whole) for i, name in enumerate(names) if name != str(i)]
        for name, i in pairs:
            self._ids.setdefault(name.casefold(), set()).add(i)
        self.unique = dict(sorted((name, i) for name, i in pairs if len(self._ids[name.casefold()]) == 1))

    def for_classes(self, num_classes: int | None) -> LabelNames:
        """The names for a model of so many classes: these, with what was changed in them, if there are as many."""
        return self if num_classes in (None, self.num_classes) else LabelNames(self.id2label, num_classes)

    def _told_apart(self, i: int, *names: str) -> str:
        """The first of the names that no other class has; where all are shared or empty, one with the id behind it."""
        names = list(filter(None, names)) or [str(i)]
        candidates = chain(names, (names[0] + n * f" ({i})" for n in count(1)))
        return next(name for name in candidates if self._ids.get(name.casefold(), {i}) == {i})

    def ids(self, labels: ClassLabels) -> list[int]:
        """Class ids of labels: an id, a name in upper or lower case, a tensor or array of ids, or lists of all these.

        Nested lists are flattened.

        Raises:
            ValueError: if a label is no class, or a name is that of several; says which are close.
        """
        if isinstance(labels, np.ma.MaskedArray) or (isinstance(labels, Tensor) and odd_kind(labels)):
            raise ValueError(f"class labels must be class ids or names, got {shown(labels)}.")
        if isinstance(labels, Tensor | np.ndarray):
            labels = labels.tolist()
        if isinstance(labels, Sequence) and not isinstance(labels, str | bytes | bytearray):
            try:
                return [i for label in labels for i in self.ids(label)]
            except RecursionError:
                raise ValueError("class labels must not be in a list that holds itself.") from None
        if isinstance(labels, str):
            return [self._id_of(labels.strip())]
        if isinstance(labels, Integral) and not isinstance(labels, bool):
            return [self._checked(int(labels))]
        raise ValueError(f"class labels must be class ids or names, got {shown(labels)}.")

    def _checked(self, i: int) -> int:
        if not self.num_classes:
            raise ValueError(f"there are no classes, got {i}.")
        if not 0 <= i < self.num_classes:
            raise ValueError(f"class ids must be between 0 and {self.num_classes - 1}, got {i}.")
        return i

    def _id_of(self, name: str) -> int:
        folded = {str(known).casefold(): known for known in self.unique} if name not in self.unique else {}
        known = self.unique.get(folded.get(name.casefold(), name))
        if known is not None:
            return self._checked(integer(known, f"the id of {name!r} in `labels`", 0))
        ids = self._ids.get(name.casefold(), set())
        if len(ids) > 1:
            raise ValueError(f"several classes are named {name!r}: give one of the ids {sorted(ids)}.")
        if not self._ids:
            raise ValueError(
                f"this model has no class names, so {name!r} is none: give an id between 0 and {self.num_classes - 1}."
            )
        close = [repr(folded[match]) for match in get_close_matches(name.casefold(), folded, n=3)]
        hint = f"did you mean {' or '.join(close)}?" if close else self._some_names()
        raise ValueError(f"no class is named {name!r}: {hint}")

    def _some_names(self) -> str:
        """For whoever has no idea which there are, on a page too, where `labels` cannot be looked at."""
        named = [self.shown[i] for i in self.id2label]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        return f"there are {', '.join(named[:3])}{more}."
