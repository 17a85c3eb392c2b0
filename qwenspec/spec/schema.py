"""The JSON Schema of spec files, for editors: what people write, where the shared part and variants are partial."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from qwenspec.spec.architecture import Architecture
from qwenspec.spec.document import VARIANT_NAME, Document
from qwenspec.spec.kv_cache import KvCache
from qwenspec.spec.quantization import Quantization

_REF = "#/$defs/{model}"
# What may be null beside the architecture, its name among the definitions, and its type.
_BESIDE: dict[str, tuple[str, Any]] = {"quantization": ("Quantization", Quantization), "kv_cache": ("KvCache", KvCache)}


def json_schema() -> dict[str, Any]:
    """Draft 2020-12. It knows each key and its values; what must be complete or fit together, only `load` knows."""
    document = Document.model_json_schema()
    architecture = Architecture.model_json_schema(ref_template=_REF)
    definitions = architecture.pop("$defs")
    for name, kind in _BESIDE.values():
        alternatives = TypeAdapter(kind).json_schema(ref_template=_REF)
        definitions |= alternatives.pop("$defs") | {name: alternatives}
    variant = document.pop("$defs")["Variant"]

    # A partial mapping may lack any key, the one that chooses its kind included.
    parts = _partial(definitions | {"Architecture": architecture})
    variant["properties"] |= parts["Architecture"]["properties"]
    variant["additionalProperties"] = False
    for owner in (document, variant):
        for key, (name, _) in _BESIDE.items():
            described = owner["properties"][key]["description"]
            nullable = [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]
            owner["properties"][key] = {"anyOf": nullable, "description": described}
    described = document["properties"]["architecture"]["description"]
    document["properties"]["architecture"] = {"$ref": "#/$defs/Architecture", "description": described}
    for option in document["properties"]["variants"]["anyOf"]:
        option |= {"propertyNames": {"pattern": f"^{VARIANT_NAME}$"}} if option["type"] == "object" else {}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "qwenspec spec"}
    schema: dict[str, Any] = head | _untitled(document) | {"$defs": _untitled(parts | {"Variant": variant})}
    return schema


def schema_text() -> str:
    """The text of specs/schema/spec.v1.schema.json."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _partial(node: Any) -> Any:
    """Without `required`; alternatives overlap then, so `oneOf` becomes `anyOf`."""
    if isinstance(node, list):
        return [_partial(item) for item in node]
    if not isinstance(node, dict):
        return node
    left_out = ("required", "discriminator")
    return {"anyOf" if k == "oneOf" else k: _partial(v) for k, v in node.items() if k not in left_out}


def _untitled(node: Any) -> Any:
    """Without the titles that pydantic makes of names."""
    if isinstance(node, list):
        return [_untitled(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {k: _untitled(v) for k, v in node.items() if k != "title" or not isinstance(v, str)}
