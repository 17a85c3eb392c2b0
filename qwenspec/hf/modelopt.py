"""What NVIDIA's TensorRT Model Optimizer writes of an FP8 checkpoint: `quantization_config` in config.json or, from
older versions, hf_quant_config.json beside it. Tensors are those of compressed-tensors with scales of whole tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qwenspec.hf.config import Config
from qwenspec.hf.json_file import read_json

METHOD = "modelopt"
BESIDE = "hf_quant_config.json"
_KV_SCALES = "its scales, of k_proj and v_proj, are not read; without the key keys and values are cached unrounded"


def beside(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` that hf_quant_config.json in a checkpoint folder says; None without that file."""
    said = read_json(folder / BESIDE)
    if not isinstance(said.get("quantization"), dict):
        return None
    return {"quant_method": METHOD, **said["quantization"]}


def read(config: Config, modules: Sequence[str], head: str | None) -> dict[str, Any]:
    """The spec's `quantization`. `modules`: the linear ones in the layers; `head`: an LM head of its own."""
    for key in ("producer", "config_groups"):
        config.get(key)  # what quant_algo says, in other words
    config.fixed("group_size", None, 0, -1, why="FP8 has one scale a tensor")
    config.fixed("has_zero_point", False, None, why="float8 has no zero points")
    config.fixed("pre_quant_scale", False, None, why="activations are not multiplied before they are rounded")
    config.choice("quant_algo", ("FP8",))
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        config.fixed(key, None, why=_KV_SCALES)
    entries = [*config.names("exclude_modules"), *config.names("ignore")]
    skip = [name for name in modules if _excludes(entries, name)]
    if head and not _excludes(entries, head):
        told = f"`{head}` is quantised, as `exclude_modules` does not name it, and only linear layers may be"
        config.error("unsupported-value", told, "exclude_modules" if "exclude_modules" in config else "ignore")
    found = {"scheme": "fp8", "scales": "tensor", "activations": "static"}
    return found | ({"skip": skip} if skip else {})


def _excludes(entries: Sequence[str], module: str) -> bool:
    """Whether an entry names a module: whole, with wildcards, or by the beginning of its name up to a dot."""
    return any(fnmatchcase(module, entry) or module.startswith(f"{entry}.") for entry in entries)
