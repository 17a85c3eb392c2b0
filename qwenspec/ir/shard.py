"""Tensor parallelism: what each rank holds, and why a degree is illegal, before anything runs.

Column-parallel products are split by output features, each fused part on its own; row-parallel ones by input
features, with an all-reduce behind them. A row-parallel bias is rank 0's alone, so that the sum has it once. Key/value
heads are repeated where ranks share them. The vocabulary and the MLP's width are padded to divide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import assert_never

from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec.ir import shares
from qwenspec.ir.nodes import Fp8Format, IntFormat, Model, Param, Part, Shard, WeightFormat
from qwenspec.ir.quantized import Block, blocks
from qwenspec.ir.shares import Shared


@dataclass(frozen=True, slots=True)
class ShardedParam:
    """One rank's share of a parameter; shape and parts are the same on every rank."""

    param: Param
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class TensorParallelPlan:
    """What one of `degree` ranks holds. Vocabulary and MLP are padded with zeros at the end.

    `kv_head_indices[r]` are the model's KV heads on rank r; a head may be on several ranks, or on one several times.
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
    keys, sharing = _heads(model, attention.num_kv_heads), Sharing(model)
    held = tuple(tuple(head.start // attention.head_dim for head in keys.held(degree, rank)) for rank in range(degree))
    return TensorParallelPlan(
        degree=degree,
        num_heads=attention.num_heads // degree,
        num_kv_heads=len(held[0]),
        kv_head_indices=held,
        intermediate_size=shares.Part(mlp.intermediate_size, mlp_unit(model), 0).share(degree),
        vocab_size=shares.Part(model.vocab_size, 1, 0).share(degree),
        params=tuple(_sharded(param, sharing.of(param), degree) for param in model.params()),
    )


class Sharing:
    """How ranks share the parameters of a model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._unit = mlp_unit(model)
        self._after_attention = {id(layer.mixer.o_proj.weight) for layer in model.layers}

    def of(self, param: Param) -> Shared:
        """A parameter, all of it in one piece."""
        whole = Shared(param.name, param.shape)
        match param.shard:
            case Shard.REPLICATE:
                return whole
            case Shard.FIRST:
                return replace(whole, first=True)
            case Shard.VOCAB:
                return replace(whole, rows=(shares.Part(self.model.vocab_size, 1, 0),))
            case Shard.COLUMN:
                return replace(whole, rows=tuple(map(self._part, param.parts)))
            case Shard.ROW:
                return replace(whole, columns=self._inputs(param))
            case _:
                assert_never(param.shard)

    def blocks(self, param: Param) -> Iterator[tuple[Block, Shared]]:
        """The same for each block of rows that a parameter is stored in."""
        found, whole = blocks(param), self.of(param)
        for block, part in zip(found, whole.rows if len(found) > 1 else [None], strict=True):
            yield (
                block,
                replace(
                    whole,
                    name=block.name,
                    shape=(block.rows, *param.shape[1:]),
                    rows=(part,) if part else whole.rows,
                    block=_block(block.format),
                    ordered=isinstance(block.format, IntFormat) and block.format.act_order,
                    token_scales=_has_token_scales(block.format),
                ),
            )

    def _part(self, part: Part) -> shares.Part:
        return _heads(self.model, part.heads) if part.heads else shares.Part(part.rows, self._unit, 0)

    def _inputs(self, param: Param) -> shares.Part:
        """What a row-parallel matrix reads: query heads, or the MLP's features."""
        if id(param) in self._after_attention:
            return _heads(self.model, self.model.layers[0].mixer.num_heads)
        return shares.Part(param.shape[1], self._unit, 0)


def mlp_unit(model: Model) -> int:
    """Of how many features of the MLP a rank holds all or none: those that share a scale."""
    units = {1}
    for layer in model.layers:
        mlp = layer.feed_forward
        units |= {height for block in blocks(mlp.gate_up_proj.weight) if (height := _size(block)[0])}
        units |= {width for block in blocks(mlp.down_proj.weight) if (width := _size(block)[1])}
    return math.lcm(*units)


def legal_degrees(model: Model) -> tuple[int, ...]:
    """Every degree that `plan` accepts, ascending; 1 is always among them."""
    return tuple(shares.legal_degrees(_parameters(model)))


def refused_by_format(model: Model) -> dict[int, tuple[str, ...]]:
    """Degrees that full precision allows and a quantised format does not, with every reason."""
    parameters = _parameters(model)
    plain = [replace(parameter, block=None) for parameter in parameters]
    found = {degree: shares.obstacles(parameters, degree) for degree in shares.legal_degrees(plain)}
    return {degree: tuple(reasons) for degree, reasons in found.items() if reasons}


def obstacles(model: Model, degree: int) -> list[Diagnostic]:
    """Why `degree` is illegal, one diagnostic a reason; empty when it is legal."""
    parameters = _parameters(model)
    if not (reasons := shares.obstacles(parameters, degree)):
        return []
    hint = shares.explanation(parameters)
    return [Diagnostic("tensor-parallel-degree", reason, hint=hint) for reason in reasons]


def _parameters(model: Model) -> list[Shared]:
    """Layers that differ in nothing but their index are one."""
    sharing = Sharing(model)
    found = [held for param in model.params() for _, held in sharing.blocks(param)]
    return list({replace(held, name=shares.title(held)): held for held in found}.values())


def _heads(model: Model, heads: int) -> shares.Part:
    """Query heads or key/value heads."""
    attention = model.layers[0].mixer
    return shares.Part(heads * attention.head_dim, attention.head_dim, attention.num_heads // heads)


def _size(block: Block) -> tuple[int, int]:
    return _block(block.format) or (1, 1)


def _block(format: WeightFormat | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale; 0 columns: whole rows."""
    match format:
        case Fp8Format(block=block):
            return block
        case IntFormat(group_size=size):
            return (1, size or 0)
        case None:
            return None


def _has_token_scales(format: WeightFormat | None) -> bool:
    return isinstance(format, Fp8Format) and format.activations == "dynamic" and not format.block[1]


def _sharded(param: Param, held: Shared, degree: int) -> ShardedParam:
    parts = param.parts
    if held.rows:
        parts = tuple(
            replace(part, rows=share.share(degree), heads=share.share(degree) // share.unit if part.heads else 0)
            for part, share in zip(parts, held.rows, strict=True)
        )
    return ShardedParam(param, held.share(degree), parts)
