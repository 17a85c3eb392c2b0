"""Read spec files: positions, `extends`, variants, merge, validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qwenspec.spec.checkpoint import Layout
from qwenspec.spec.document import Spec


def load(path: str | Path, variant: str | None = None) -> Spec:
    """The spec of one variant (default: the file's default_variant)."""
    # Provisional: to be replaced by the version with diagnostics.
    doc = yaml.safe_load(Path(path).read_text())
    name = variant or doc["default_variant"]
    layouts = Path(__file__).parent / "layouts"

    def merge(a: Any, b: Any) -> Any:
        if isinstance(a, dict) and isinstance(b, dict):
            return {k: merge(a[k], b[k]) if k in a and k in b else b.get(k, a.get(k)) for k in {**a, **b}}
        return b

    arch = merge(doc["architecture"], doc["variants"][name])
    layout = arch.get("checkpoint", {"layout": "qwen2"})["layout"]
    if isinstance(layout, str):
        layout = yaml.safe_load((layouts / f"{layout}.yaml").read_text())
    return Spec.model_validate(
        {"family": doc["family"], "variant": name, "architecture": arch, "quantization": doc.get("quantization"),
         "layout": Layout.model_validate(layout, strict=False), "file": str(path)}, strict=False)
