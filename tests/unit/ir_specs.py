"""Small specs for the tests of the IR, written as YAML and read as a user's would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qwenspec.spec.document import Spec
from qwenspec.spec.load import load

ARCHITECTURE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "norm": {"eps": 1e-6},
    "rope": {"theta": 1e4},
}


def make_spec(folder: Path, **architecture: Any) -> Spec:
    """The architecture above with some of its keys replaced."""
    document = {
        "schema_version": 1,
        "family": "test",
        "default_variant": "small",
        "architecture": ARCHITECTURE | architecture,
        "variants": {"small": {}},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(document))
    return load(path)
