"""What callers may give to a model and its cache; whatever computes, a wrong call is told in these words.

It has to cost little beside a decode step: shapes, dtypes and numbers of the host are looked at.
[GPU_TENSORS] Numbers on a GPU are not: reading them would make every step wait for the one before."""

from __future__ import annotations

from numbers import Integral
from typing import Any

GPU_TENSORS = True  # flag: token ids and positions may lie on a GPU

INTEGERS = ("int32", "int64")


def check_integer(name: str, value: object, least: int | None = None) -> None:
    """Of any integer type, but no bool, and at least `least`."""
    whole = type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))
    if whole and (least is None or value >= least):  # type: ignore[operator]
        return
    bound = "" if least is None else f" of at least {least}"
    raise ValueError(f"{name} is {value!r}, and should be an integer{bound}")


def check_integers(numbers: Any, name: str, end: int) -> None:
    """[n], int32 or int64, each in 0 … end - 1: computing code reads where they say.

    [GPU_TENSORS] Those on a GPU are not compared with `end`."""
    dtype = str(getattr(numbers, "dtype", type(numbers).__name__)).removeprefix("torch.")
    shape = list(getattr(numbers, "shape", ()))
    if dtype not in INTEGERS or len(shape) != 1 or not shape[0]:
        raise ValueError(f"{name} are int32 or int64 [n], at least one, and not {dtype} {shape}")
    if GPU_TENSORS and not hasattr(numbers, "is_cuda"):
        raise ValueError(f"{name} are a tensor of torch, and not a {type(numbers).__name__}")
    if GPU_TENSORS and numbers.is_cuda:
        return
    if numbers.min() < 0 or numbers.max() >= end:
        wrong = numbers[(numbers < 0) | (numbers >= end)][0]
        raise ValueError(f"{name}: {int(wrong)} is not in 0 … {end - 1}")


def check_embeds(embeds: Any, rows: int | None, columns: int | None, hidden_size: int) -> None:
    """[rows, columns, hidden], where None is any number but 0."""
    shape = list(getattr(embeds, "shape", ()))
    wanted = (rows, columns, hidden_size)
    if len(shape) != 3 or 0 in shape or any(w not in (None, s) for s, w in zip(shape, wanted, strict=True)):
        names = ", ".join(str(w) if w else name for w, name in zip(wanted, ("b", "n", ""), strict=True))
        raise ValueError(f"embeds are {shape}, and this method takes [{names}]")


def check_cache(cache: object, kind: type) -> None:
    """One of this package."""
    if not isinstance(cache, kind):
        raise TypeError(f"the cache is a {type(cache).__name__}, and not one of this model's create_paged_kv_cache")
