"""Two variants that differ by a line of their spec differ by that line's consequence and nothing else.

Each golden file is the diff between two generated packages: what a reviewer would see. UPDATE_GOLDEN=1 rewrites.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hf_parity.oracle import QWEN2, QWEN3, tiny_spec
from qwenspec.backend.emit import dump_manifest, render_package
from qwenspec.backend.registry import find

GOLDEN = Path(__file__).parent
BACKENDS = ("triton", "tvm")
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_to_qwen3": (QWEN2, QWEN3),
    "sizes": ({}, {"hidden_size": 64, "num_hidden_layers": 3}),
    "bias_qkv": ({}, {"attention": {"bias": {"qkv": True}}}),
    "bias_output": ({}, {"attention": {"bias": {"output": True}}}),
    "bias_mlp": ({}, {"mlp": {"bias": True}}),
    "tied": ({}, {"tie_word_embeddings": True}),
    "norm_one_plus": (QWEN3, {**QWEN3, "norm": {"weight": "one_plus"}}),
    "activation": ({}, {"mlp": {"activation": "gelu_new"}}),
    "logn": ({}, {"attention": {"logn": {"train_length": 32}}}),
    "window_all": ({}, {"attention": {"sliding_window": {"window": 8}}}),
    "window_mixed": ({}, {"attention": {"sliding_window": {"window": 8, "layers": {"from": 1}}}}),
    "rope_partial": ({}, {"rope": {"partial_rotary_factor": 0.5}}),
    "rope_float32": ({}, {"rope": {"compute_dtype": "float32"}}),
    "rope_linear": ({}, {"rope": {"scaling": {"kind": "linear", "factor": 2.0}}}),
    "rope_yarn": ({}, {"rope": {"scaling": YARN}}),
    "rope_dynamic": ({}, {"rope": {"scaling": {"kind": "dynamic", "factor": 2.0}}}),
    "rope_dynamic_qwen1": ({}, {"rope": {"scaling": {"kind": "dynamic_qwen1", "train_length": 32}}}),
    "lm_head_float32": ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "lm_head": {"dtype": "float32"}}),
    "embedding": ({}, {"lm_head": None, "embedding": {"normalize": True}}),
}


@functools.cache
def package(backend: str, change: str) -> dict[str, list[str]]:
    """File -> lines, without the banner and the hashes, which differ between any two specs."""
    files = render_package(tiny_spec(json.loads(change)), find(backend))
    manifest = json.loads(files["MANIFEST.json"])
    del manifest["files"]
    files["MANIFEST.json"] = dump_manifest(manifest)
    return {
        name: [line for line in text.splitlines() if not line.startswith(("# Generated", "#   qwenspec", '  "spec'))]
        for name, text in files.items()
    }


def difference(backend: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    old, new = package(backend, json.dumps(before)), package(backend, json.dumps(after))
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        lines += difflib.unified_diff(old.get(name, []), new.get(name, []), name, name, n=1, lineterm="")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHANGES)
def test_diff_is_golden(name: str, backend: str) -> None:
    found = difference(backend, *CHANGES[name])
    file = GOLDEN / backend / f"{name}.diff"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(found)
    assert found == file.read_text()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_golden_file_is_used(backend: str) -> None:
    assert {file.stem for file in (GOLDEN / backend).glob("*.diff")} == set(CHANGES)
