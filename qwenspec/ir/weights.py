"""Checkpoint tensors behind IR parameters.

Every tensor's name is a module's name in the checkpoint, a dot and a suffix: `weight` and `bias` here, others
(`qweight`, `weight_scale_inv`) after the very same names in a quantised checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec.ir.nodes import Param, Part, Source
from qwenspec.spec.checkpoint import Layout

Modules = Mapping[str, tuple[str, ...]]


def modules(layout: Layout, num_layers: int) -> Modules:
    """IR module address -> the checkpoint modules that fill it, top row first."""
    attention, mlp = layout.attention, layout.mlp
    in_layer: dict[str, tuple[str | None, ...]] = {
        "input_norm": (layout.input_norm,),
        "attention.qkv_proj": attention.qkv,
        "attention.q_norm": (attention.q_norm,),
        "attention.k_norm": (attention.k_norm,),
        "attention.o_proj": (attention.o,),
        "post_attention_norm": (layout.post_attention_norm,),
        "mlp.gate_up_proj": mlp.gate_up,
        "mlp.down_proj": (mlp.down,),
    }
    found: dict[str, tuple[str, ...]] = {
        "embed_tokens": (layout.embedding,),
        "norm": (layout.norm,),
        "lm_head": (layout.lm_head,),
    }
    for i in range(num_layers):
        prefix = layout.layer.replace("{i}", str(i))
        for address, names in in_layer.items():
            found[f"layers.{i}.{address}"] = tuple(f"{prefix}.{name}" for name in names if name is not None)
    return found


def sources(names: tuple[str, ...], suffix: str, parts: tuple[Part, ...]) -> tuple[Source, ...]:
    """The tensors of one parameter: one a part, or a single one that holds all parts on disk too."""
    if len(names) == 1:
        return (Source(f"{names[0]}.{suffix}", sum(part.rows for part in parts)),)
    assert len(names) == len(parts), f"the spec's rules let {names} through for {parts}"
    return tuple(Source(f"{name}.{suffix}", part.rows) for name, part in zip(names, parts, strict=True))


def check_distinct(params: Iterable[Param]) -> None:
    """No two parameters, nor two parts of one, may read the same tensor: SpecError (`tensor-read-twice`)."""
    reader: dict[str, str] = {}
    twice: list[Diagnostic] = []
    for param in params:
        for source in param.sources:
            if first := reader.get(source.tensor):
                twice.append(
                    Diagnostic(
                        "tensor-read-twice",
                        f"the checkpoint layout gives {source.tensor} to both {first} and {param.name}",
                        hint="give each module its own name in the layout",
                    )
                )
            reader[source.tensor] = param.name
    if twice:
        raise SpecError(twice)
