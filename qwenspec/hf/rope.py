"""Rotary embedding in config.json, both ways.

transformers 4 keeps `rope_theta` and `rope_scaling` apart, version 5 has both in `rope_parameters`. The keys
of a scaling have the same names in both and in the spec.
"""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from qwenspec.diagnostics import listed
from qwenspec.hf.config import Config
from qwenspec.spec import rope as spec_rope

# What Hugging Face's Qwen2 and Qwen3 can compute. Its rope types that are not here are other families'.
SCALINGS: dict[str, type[BaseModel]] = {
    "linear": spec_rope.Linear,
    "dynamic": spec_rope.Dynamic,
    "yarn": spec_rope.Yarn,
    "longrope": spec_rope.LongRope,
    "llama3": spec_rope.Llama3,
}
ORIGINAL = "original_max_position_embeddings"
LAYER_TYPES = ("full_attention", "sliding_attention")
ASSUMED_THETA = 10000.0  # Hugging Face's for Qwen2 and Qwen3: right for Qwen2.5-Math alone


def read(config: Config, max_position_embeddings: int | None) -> dict[str, Any]:
    """The spec's `rope` from either form."""
    scaling = _parameters(config)
    # Hugging Face ignores this one, or fails on it: nothing that it loads can mean anything but 1.
    for where in (config, scaling):
        where.fixed("partial_rotary_factor", 1.0, None, why="Hugging Face's Qwen2 and Qwen3 rotate the whole head")
    rope: dict[str, Any] = {"theta": _theta(config, scaling), "compute_dtype": "activation"}
    kind = _kind(scaling)
    scaling.get("finetuned")  # whether the model was trained further with it; the formula is the same
    if kind == "default":
        return rope
    if kind not in SCALINGS:
        scaling.error(
            "unsupported-rope-type",
            f"rope type `{kind}` is not supported: {listed(SCALINGS)} are, and `default`",
            "rope_type" if "rope_type" in scaling else "type",
        )
        scaling.unread.clear()
        return rope
    rope["scaling"] = {"kind": kind, **_fields(config, scaling, SCALINGS[kind], max_position_embeddings)}
    if kind == "yarn":
        config.note(
            "YaRN is on and changes every position, also in prompts that would have fitted without it: "
            "set rope.scaling to null where contexts are short."
        )
    return rope


def write(rope: spec_rope.Rope, form: str) -> dict[str, Any]:
    """The keys of config.json for a rope whose scaling is one of SCALINGS, or none."""
    fields: dict[str, Any] = {"rope_type": "default"}
    if rope.scaling is not None:
        fields = rope.scaling.model_dump(mode="json", exclude_none=True, exclude={"kind"})
        fields = {"rope_type": rope.scaling.kind, **fields}
    if form == "v5":
        return {"rope_parameters": {"rope_theta": rope.theta, **fields}}
    return {"rope_theta": rope.theta, "rope_scaling": fields if rope.scaling else None}


def _parameters(config: Config) -> Config:
    """The object with the rope type: rope_scaling or rope_parameters, out of its layer types if need be."""
    old, new = config.child("rope_scaling"), config.child("rope_parameters")
    if old and new and old.tree != new.tree:
        config.error(
            "conflict",
            "`rope_scaling` and `rope_parameters` differ",
            "rope_parameters",
            "keep one; Hugging Face would take rope_scaling",
        )
    if old and new:
        new.unread.clear()
    chosen = old or new or Config({}, config.report)
    nested = [child for child in map(chosen.child, LAYER_TYPES) if child]
    if not nested:
        return chosen
    for other in nested[1:]:
        if other.tree != nested[0].tree:
            chosen.error(
                "rope-per-layer",
                "the layer types have different rotary embeddings, and a spec has one for all layers",
                "sliding_attention",
            )
        other.unread.clear()
    return nested[0]


def _theta(config: Config, scaling: Config) -> float | None:
    if "rope_theta" not in scaling:
        return config.number("rope_theta", ASSUMED_THETA)
    theta = scaling.number("rope_theta")
    if config.get("rope_theta") not in (None, theta):
        config.error("conflict", "`rope_theta` is given twice with different values", "rope_theta")
    return theta


def _kind(scaling: Config) -> str:
    new, old = scaling.get("rope_type"), scaling.get("type")
    if None not in (new, old) and new != old:
        scaling.error("conflict", f"`rope_type` is {new} and `type` is {old}", "type")
    return str(new or old or "default")


def _fields(
    config: Config, scaling: Config, model: type[BaseModel], max_position_embeddings: int | None
) -> dict[str, Any]:
    """The scaling's own keys. Absent and null ones are left to the spec's defaults, Hugging Face's too."""
    given = {name: scaling.get(name) for name in model.model_fields if name in scaling}
    fields = {name: value for name, value in given.items() if value is not None}
    if ORIGINAL in model.model_fields:
        outer = config.get(ORIGINAL)
        if outer is not None and fields.setdefault(ORIGINAL, outer) != outer:
            config.error("conflict", f"`{ORIGINAL}` is given twice with different values", ORIGINAL)
        if ORIGINAL not in fields and max_position_embeddings:
            fields[ORIGINAL] = max_position_embeddings
            config.note(
                f"rope: `{ORIGINAL}` is not given; it is max_position_embeddings, as Hugging Face assumes. "
                "That is wrong if max_position_embeddings has been raised to the longer context."
            )
        original = fields.get(ORIGINAL)
        if model is spec_rope.Yarn and "factor" not in fields and max_position_embeddings and type(original) is int:
            fields["factor"] = max_position_embeddings / max(original, 1)
    kind = get_args(model.model_fields["kind"].annotation)[0]
    try:
        model.model_validate({"kind": kind, **fields}, strict=False)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0])
            code, said = (
                ("missing-key", "is missing") if problem["type"] == "missing" else ("wrong-value", problem["msg"])
            )
            scaling.error(code, f"rope type `{kind}`: `{name}` {said}", name)
    return fields
