"""How templates write linear layers, quantised or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwenspec.backend.package import linear_blocks
from qwenspec.backend.structure import Structure
from qwenspec.ir.nodes import Fp8Format, Model, WeightFormat


@dataclass(frozen=True)
class Kind:
    """Code that a format of weights goes by: Int4Linear, int4_linear, Int4Matrix."""

    name: str
    title: str
    parameter: str = ""  # of constructors, with its type
    field: str = ""  # of Config, that gives its value
    has_bias: bool = False

    @property
    def function(self) -> str:
        return f"{self.name.lower()}_linear"

    @property
    def argument(self) -> str:
        """The parameter passed on, after others."""
        return f", {self.parameter.partition(':')[0]}" if self.parameter else ""

    @property
    def configured(self) -> str:
        """The parameter's value, after others."""
        return f", config.{self.field}" if self.field else ""


def linear_context(model: Model, shape: Structure) -> dict[str, Any]:
    """The names that templates read of linear layers."""
    pieces = [piece for blocks in linear_blocks(model).values() for piece in blocks]
    biased = shape.qkv_bias or shape.o_bias or shape.mlp_bias
    kind = _kind(shape.weights, biased) if shape.weights else None
    head_kind = _kind(shape.head_weights, False) if shape.head_weights else None
    plain_head = shape.head != "embedding" and head_kind is None
    plain_layers = any(not quantized for _, quantized in pieces)

    def linear(name: str, in_features: str, out_features: str, bias: bool) -> str:
        """A call that makes the layer."""
        sizes = f"{in_features}, {out_features}"
        if kind is None:
            return f"Linear({sizes}, bias={bias})"
        bias_argument = f", bias={bias}" if biased else ""
        if shape.apart:
            return f'linear_layer(f"{{name}}.{name}", config, {sizes}{bias_argument})'
        return f"{kind.name}Linear({sizes}{kind.configured}{bias_argument})"

    return {
        "linear": linear,
        "biased": biased,
        "kind": kind,
        "head_kind": head_kind,
        "kinds": {k.name: k for k in (head_kind if shape.head == "linear" else None, kind) if k}.values(),
        "matrices": sorted({k.name for k in (kind, head_kind) if k}),
        "plain_product": plain_head or plain_layers,
        "plain_class": (plain_head and shape.head == "linear") or plain_layers,
        "plain_wholes": any(not part for part, _ in pieces),
        "plain_parts": any(part and not quantized for part, quantized in pieces),
        "fused_apart": any(part for part, _ in pieces),
    }


def _kind(format: WeightFormat, biased: bool) -> Kind:
    if isinstance(format, Fp8Format):
        title = "in float8" + " and inputs rounded to it" * (format.activations != "none")
        if format.scales != "block":
            return Kind("Fp8", title, has_bias=biased)
        return Kind("Fp8", title, "block: tuple[int, int]", "weight_block", biased)
    title = f"of {format.bits}-bit integers"
    if format.group_size is None:
        return Kind(f"Int{format.bits}", title, has_bias=biased)
    return Kind(f"Int{format.bits}", title, "group_size: int", "group_size", biased)
