"""Tensor parallelism: what each rank holds, and why a degree is illegal, before anything runs.

Column-parallel products are split by output features, each fused part on its own; row-parallel ones by input
features, with an all-reduce behind them. A row-parallel bias is whole on every rank and must be added on one
only. Key/value heads are repeated when there are fewer than ranks. The vocabulary is padded to divide.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import assert_never

from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec.ir.nodes import Fp8Format, IntFormat, Linear, Model, Param, Part, Shard
from qwenspec.ir.quantized import blocks


@dataclass(frozen=True, slots=True)
class ShardedParam:
    """One rank's share of a parameter; shape and parts are the same on every rank."""

    param: Param
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class TensorParallelPlan:
    """What one of `degree` ranks holds. The padded vocabulary has degree · vocab_size rows, zeros at the end.

    `kv_head_indices[r]` are the model's KV heads on rank r; with fewer heads than ranks a head is on several.
    """

    degree: int
    num_heads: int
    num_kv_heads: int
    kv_head_indices: tuple[tuple[int, ...], ...]
    intermediate_size: int
    vocab_size: int
    params: tuple[ShardedParam, ...]


def plan(model: Model, degree: int) -> TensorParallelPlan:
    """Every rank's shapes. Raises SpecError (`tensor-parallel-degree`) with every reason against `degree`."""
    if problems := obstacles(model, degree):
        raise SpecError(problems)
    attention, mlp = model.layers[0].mixer, model.layers[0].feed_forward
    return TensorParallelPlan(
        degree=degree,
        num_heads=attention.num_heads // degree,
        num_kv_heads=_heads_per_rank(attention.num_kv_heads, degree),
        kv_head_indices=tuple(kv_heads_of(attention.num_kv_heads, degree, rank) for rank in range(degree)),
        intermediate_size=mlp.intermediate_size // degree,
        vocab_size=_ceil_div(model.vocab_size, degree),
        params=tuple(_shard(param, degree) for param in model.params()),
    )


def kv_heads_of(num_kv_heads: int, degree: int, rank: int) -> tuple[int, ...]:
    """The KV heads that the query heads of `rank` read."""
    first = rank * num_kv_heads // degree
    return tuple(range(first, first + _heads_per_rank(num_kv_heads, degree)))


def rows_of(param: Param, degree: int, rank: int) -> tuple[range, ...]:
    """Which rows (dim 0) of a parameter `rank` holds, one range a part, in the order in which they lie there.

    `degree` is legal. Of the padded vocabulary the last ranks have fewer rows than their share: zeros follow.
    """
    rows = param.shape[0]
    match param.shard:
        case Shard.REPLICATE | Shard.ROW:
            return (range(rows),)
        case Shard.VOCAB:
            share = _ceil_div(rows, degree)
            return (range(min(rank * share, rows), min((rank + 1) * share, rows)),)
        case Shard.COLUMN:
            starts = itertools.accumulate((part.rows for part in param.parts), initial=0)
            return tuple(
                _rows_of_part(part, start, degree, rank) for part, start in zip(param.parts, starts, strict=False)
            )
        case _:
            assert_never(param.shard)


def columns_of(param: Param, degree: int, rank: int) -> range:
    """Which columns (dim 1) of a matrix `rank` holds."""
    columns = param.shape[1]
    if param.shard is not Shard.ROW:
        return range(columns)
    share = columns // degree
    return range(rank * share, (rank + 1) * share)


def legal_degrees(model: Model) -> tuple[int, ...]:
    """Every degree that `plan` accepts, ascending; 1 is always among them."""
    most = min(layer.mixer.num_heads for layer in model.layers)
    return tuple(degree for degree in range(1, most + 1) if not _reasons(model, degree))


def refused_by_format(model: Model) -> dict[int, tuple[str, ...]]:
    """Degrees that full precision allows and a quantised format does not, with every reason."""
    most = min(layer.mixer.num_heads for layer in model.layers)
    degrees = [degree for degree in range(2, most + 1) if not _uneven(model, degree)]
    return {degree: tuple(reasons) for degree in degrees if (reasons := _reasons(model, degree))}


def obstacles(model: Model, degree: int) -> list[Diagnostic]:
    """Why `degree` is illegal, one diagnostic a reason; empty when it is legal."""
    hint = "degrees that work: " + ", ".join(map(str, legal_degrees(model)))
    return [Diagnostic("tensor-parallel-degree", reason, hint=hint) for reason in _reasons(model, degree)]


def _reasons(model: Model, degree: int) -> list[str]:
    if degree < 1:
        return [f"a tensor-parallel degree counts ranks, from 1 on; found {degree}"]
    reasons = _uneven(model, degree)
    if not reasons and degree > 1:
        reasons = [reason for layer in model.layers for linear in layer.linears() for reason in _cuts(linear, degree)]
    return list(dict.fromkeys(reasons))  # what holds for every layer is said once


def _uneven(model: Model, degree: int) -> list[str]:
    """What of the architecture ranks cannot share."""
    reasons: list[str] = []
    for layer in model.layers:
        heads, kv_heads = layer.mixer.num_heads, layer.mixer.num_kv_heads
        width = layer.feed_forward.intermediate_size
        if heads % degree:
            reasons.append(
                f"layers.*.attention.qkv_proj: {heads} query heads cannot be shared evenly by {degree} ranks"
            )
        if kv_heads % degree and degree % kv_heads:
            reasons.append(
                f"layers.*.attention.qkv_proj: {kv_heads} key/value heads can neither be shared nor repeated "
                f"evenly by {degree} ranks"
            )
        if width % degree:
            reasons.append(f"layers.*.mlp.gate_up_proj and down_proj: width {width} does not divide by {degree} ranks")
    return reasons


def _cuts(linear: Linear, degree: int) -> Iterator[str]:
    """What ranks would cut that shares a scale: blocks of rows, groups and blocks of columns."""
    param = linear.weight
    name = re.sub(r"layers\.\d+", "layers.*", linear.name)
    for block in blocks(param):
        match block.format:
            case Fp8Format(block=(height, width)):
                cut = sorted({rows for piece in rows_of(param, degree, 1) for rows in (piece.start, len(piece))})
                if param.shard is Shard.COLUMN and any(rows % height for rows in cut):
                    yield f"{name}: {degree} ranks would cut its blocks of {height} rows"
                size: int | None = width
            case IntFormat(group_size=size, act_order=act_order):
                if act_order and param.shard is Shard.ROW:
                    yield f"{name}: desc_act puts inputs of all {degree} ranks into one group"
                    continue
            case None:
                continue
        inputs = param.shape[1] // degree
        if param.shard is Shard.ROW and size is not None and inputs % size:
            yield f"{name}: {inputs} inputs on each of {degree} ranks are not a multiple of its groups of {size}"


def _shard(param: Param, degree: int) -> ShardedParam:
    rows, rest = param.shape[0], param.shape[1:]
    match param.shard:
        case Shard.REPLICATE:
            return ShardedParam(param, param.shape, param.parts)
        case Shard.ROW:
            return ShardedParam(param, (rows, rest[0] // degree), param.parts)
        case Shard.COLUMN:
            parts = tuple(_shard_part(part, degree) for part in param.parts)
        case Shard.VOCAB:
            parts = (replace(param.parts[0], rows=_ceil_div(rows, degree)),)
        case _:
            assert_never(param.shard)
    return ShardedParam(param, (sum(part.rows for part in parts), *rest), parts)


def _shard_part(part: Part, degree: int) -> Part:
    if not part.heads:
        return replace(part, rows=part.rows // degree)
    heads = _heads_per_rank(part.heads, degree)
    return replace(part, rows=part.rows // part.heads * heads, heads=heads)


def _rows_of_part(part: Part, start: int, degree: int, rank: int) -> range:
    """Of a part that starts at row `start`."""
    if part.heads:  # query heads divide by the degree, and then the same holds of them
        size, held = part.rows // part.heads, kv_heads_of(part.heads, degree, rank)
        return range(start + held[0] * size, start + (held[-1] + 1) * size)
    share = part.rows // degree
    return range(start + rank * share, start + (rank + 1) * share)


def _heads_per_rank(heads: int, degree: int) -> int:
    return max(heads // degree, 1)


def _ceil_div(value: int, by: int) -> int:
    return -(-value // by)
