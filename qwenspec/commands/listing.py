"""`list`: the variants that come with qwenspec, or those of a file."""

from __future__ import annotations

from typing import Any

from qwenspec.ir import cost
from qwenspec.ir.lower import lower
from qwenspec.spec import bundled
from qwenspec.spec.document import Spec
from qwenspec.spec.load import load_all

Data = dict[str, Any]
COLUMNS = ("variant", "parameters", "layers", "hidden", "heads", "context", "quantisation", "file")
NUMBERS = COLUMNS[1:6]  # right-aligned


def variants(file: str | None) -> list[Data]:
    """Each variant of `file`, or of everything that comes with qwenspec, and its sizes."""
    names = [file] if file else [bundled.PREFIX + name for name in bundled.files()]
    return [_sizes(spec) for name in names for spec in load_all(name)]


def _sizes(spec: Spec) -> Data:
    model = lower(spec)
    attention = model.layers[0].mixer
    return {
        "variant": spec.variant,
        "file": spec.file,
        "description": spec.description,
        "parameters": cost.count_parameters(model).total,
        "num_hidden_layers": len(model.layers),
        "hidden_size": model.hidden_size,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "quantization": spec.quantization.model_dump() if spec.quantization else None,
    }


def variants_text(found: list[Data]) -> str:
    rows = [COLUMNS, *map(_row, found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if name in NUMBERS else text.ljust(width)
            for name, text, width in zip(COLUMNS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    )


def _row(data: Data) -> tuple[str, ...]:
    return (
        data["variant"],
        f"{data['parameters'] / 1e9:,.2f}B" if data["parameters"] >= 1e7 else f"{data['parameters']:,}",
        str(data["num_hidden_layers"]),
        str(data["hidden_size"]),
        f"{data['num_attention_heads']}/{data['num_key_value_heads']}",
        f"{data['max_position_embeddings']:,}",
        "-" if data["quantization"] is None else data["quantization"]["scheme"],
        data["file"],
    )
