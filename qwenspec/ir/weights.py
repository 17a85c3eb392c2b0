"""Checkpoint tensors behind IR parameters.

Every tensor's name is a module's name in the checkpoint, a dot and a suffix: `weight` and `bias` here, others
(`qweight`, `weight_scale_inv`, see `qwenspec.ir.quantized`) after the very same names in a quantised checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec.ir.nodes import Param, Part, Source, WeightFormat
from qwenspec.spec.checkpoint import Layout

Modules = Mapping[str, tuple[str, ...]]
Formats = Mapping[str, WeightFormat]
LINEARS = ("attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj")  # of a layer


def modules(layout: Layout, num_layers: int) -> Modules:
    """IR module address -> the checkpoint modules that fill it, top row first."""
    attention, mlp = layout.attention, layout.mlp
    in_layer: dict[str, tuple[str | None, ...]] = {
        "input_norm": (layout.input_norm,),
        "attention.qkv_proj": attention.qkv,
        "attention.q_norm": (attention.q_norm,),
        "attention.k_norm": (attention.k_norm,),
        "attention.o_proj": (attention.o,),
        "attention": (attention.kv_scales,),  # its own tensors are the KV cache's scales
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


def linears(layout: Layout, num_layers: int) -> list[str]:
    """The checkpoint's linear modules in the layers, in order."""
    found = modules(layout, num_layers)
    return [name for i in range(num_layers) for linear in LINEARS for name in found[f"layers.{i}.{linear}"]]


def sources(names: tuple[str, ...], suffix: str, parts: tuple[Part, ...], formats: Formats) -> tuple[Source, ...]:
    """The tensors of one parameter: one a part, or a single one that holds all parts on disk too.

    `formats` are those of quantised modules: of their weights, not of their biases."""
    rows = [part.rows for part in parts]
    if len(names) == 1:
        rows = [sum(rows)]
    assert len(names) == len(rows), f"the spec's rules let {names} through for {parts}"
    return tuple(
        Source(f"{name}.{suffix}", n, formats.get(name) if suffix == "weight" else None)
        for name, n in zip(names, rows, strict=True)
    )


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
