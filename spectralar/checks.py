"""Arguments of every kind they come in -> plain numbers and tensors, or one sentence that names the argument."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from numbers import Integral, Number, Real
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

# What `as_codes` takes.
Codes = Tensor | np.ndarray | Sequence[Any]


def shown(value: Any) -> str:
    """A value as it is written in Python, in short and on one line."""
    try:
        return " ".join(reprlib.repr(value).split())
    except Exception:  # whatever a stranger's __repr__ may raise
        return type(value).__name__


def odd_kind(tensor: Tensor) -> str:
    """What keeps the numbers of a tensor from being read as those of others: "meta", "sparse", ..; "" if nothing."""
    kinds = {"meta": tensor.is_meta, "nested": tensor.is_nested, "quantized": tensor.is_quantized}
    kinds["sparse"] = tensor.layout != torch.strided
    return next((kind for kind, is_so in kinds.items() if is_so), "")


def scalar(value: Any) -> Any:
    """The Python number in a tensor or array without axes; all else as it is."""
    if isinstance(value, np.ma.MaskedArray) or (isinstance(value, Tensor) and odd_kind(value)):
        return value
    return value.item() if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0 else value


def real(value: Any, name: str) -> float:
    """Any real number, of Python, numpy or torch, as a float; of a number too large for one, infinity."""
    number = scalar(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise ValueError(f"{name} must be a number, got {shown(value)}.")
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def integer(value: Any, name: str, low: int, high: int | None = None, limits: str | None = None) -> int:
    """Any integer, of Python, numpy or torch, between `low` and `high`; `limits` says so in other words."""
    number = scalar(value)
    is_integer = isinstance(number, Integral) and not isinstance(number, bool)
    if not is_integer or number < low or (high is not None and number > high):
        limits = limits or (f"of at least {low}" if high is None else f"between {low} and {high}")
        raise ValueError(f"{name} must be an integer {limits}, got {shown(value)}.")
    return int(number)


def one_of(value: Any, name: str, choices: Sequence[str]) -> str:
    """One of a few names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}.")
    return value


# ------------------------------------------------------------------------------------------------ codes


def as_codes(codes: Codes, name: str, codebook_size: int, device: torch.device) -> Tensor:
    """Codes from a tensor, an array or nested lists, of tensors too: int64 on the device, of any shape and range.

    Raises:
        ValueError: if they are not integers in a rectangular array.
    """

    def fail(found: str) -> NoReturn:
        raise ValueError(f"{name} must be integers between 0 and {codebook_size - 1}, got {found}.")

    def plain(value: Any) -> Any:
        """Nested lists of ints."""
        if isinstance(value, np.ma.MaskedArray):
            fail("a masked array")
        if isinstance(value, Tensor):
            return plain(as_codes(value, name, codebook_size, value.device).tolist())
        if isinstance(value, np.ndarray | np.generic):
            if value.dtype.kind not in "iuO" and value.size:  # arrays of nothing are floats
                fail(f"an array of {value.dtype}")
            return plain(value.tolist())
        if isinstance(value, str | bytes | bytearray | memoryview):
            fail(shown(value))
        if isinstance(value, Sequence):
            return [plain(row) for row in value]
        if isinstance(value, Number) and (isinstance(value, bool) or not isinstance(value, Integral)):
            fail(shown(value))
        return value

    if not isinstance(codes, Tensor):
        try:
            numbers = plain(codes)
        except RecursionError:
            fail("a list that holds itself")
        try:
            return torch.tensor(numbers, dtype=torch.int64, device=device)
        except (TypeError, ValueError, RuntimeError) as error:  # the last for numbers beyond 64 bits
            raise ValueError(f"{name} must be a rectangular array of integers: {error}.") from error
    if kind := odd_kind(codes):
        fail(f"a {kind} tensor")
    if codes.numel() and (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool):
        fail(f"a tensor of {codes.dtype}")
    codes = codes.to(device, torch.int64)
    return codes.clone() if codes.is_inference() else codes  # which autograd would not take


def check_codes(codes: Tensor, name: str, num_tokens: int, codebook_size: int) -> Tensor:
    """Codes (B, n) of any integer type as int64.

    Raises:
        ValueError: if they are not integers of this shape with n in 1..N, all in 0..K-1.
    """
    if not isinstance(codes, Tensor):
        raise ValueError(f"{name} must be a tensor, got {shown(codes)}.")
    codes = as_codes(codes, name, codebook_size, codes.device)
    if codes.ndim != 2 or not 1 <= codes.shape[1] <= num_tokens:
        raise ValueError(f"{name} must have shape (B, n) with n in 1..{num_tokens}, got {tuple(codes.shape)}.")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise ValueError(f"{name} must be integers between 0 and {codebook_size - 1}, got {found}.")
    return codes


def check_lengths(lengths: Any, limit: int) -> list[int]:
    """Prefix lengths in 1..limit from a list of integers."""
    if not isinstance(lengths, Sequence) or isinstance(lengths, str | bytes) or not lengths:
        raise ValueError("num_tokens must be an integer, a tensor of one length an image, or a list of lengths.")
    return [integer(k, "num_tokens", 1, limit) for k in lengths]


# ------------------------------------------------------------------------------------------------ images


def check_pixels(images: Any, shape: tuple[int, ...]) -> None:
    """Raises a ValueError if images are no floating-point tensor (B, *shape)."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a tensor, got {shown(images)}.")
    if kind := odd_kind(images):
        raise ValueError(f"images must be an ordinary tensor, got a {kind} one.")
    if images.ndim != 1 + len(shape) or tuple(images.shape[1:]) != shape:
        raise ValueError(f"images must have shape (B, {', '.join(map(str, shape))}), got {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point, in [-1, 1], got {images.dtype}.")
