"""`quantization_config` of compressed-tensors (llm-compressor), both ways: formats float-quantized and pack-quantized.

Groups of modules have a scheme each: how weights are rounded, and how inputs are. A group's `targets` are classes of
modules, whole names or, after `re:`, regular expressions that match the beginning of a name; so are those of `ignore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwenspec.diagnostics import listed
from qwenspec.hf.config import Config, shown
from qwenspec.hf.patterns import compiled
from qwenspec.spec.quantization import Fp8, PackQuantized

_FORMATS = ("float-quantized", "naive-quantized", "pack-quantized")
_LINEAR = "Linear"  # the class of every linear layer
# How the file was made, or what else lies in it that inference does not read.
_RECORDS = ("global_compression_ratio", "quantization_status", "version")
_ARGUMENT_RECORDS = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")


def read(config: Config, modules: Sequence[str], head: str | None) -> dict[str, Any]:
    """The spec's `quantization`. `modules`: the linear ones in the layers; `head`: an LM head of its own.

    Reports what cannot be run, by the key that says so."""
    for key in _RECORDS:
        config.get(key)
    config.fixed("kv_cache_scheme", None, why="cached keys and values are quantised by the spec's `kv_cache` alone")
    if sparsity := config.child("sparsity_config"):
        sparsity.fixed("format", "dense", None, why="with any other sparsity_config weights are stored in another way")
        sparsity.unread.clear()  # how many of the weights are zero, stored like any other
    config.fixed("transform_config", None, {}, why="rotations of activations are not implemented")
    storage = config.choice("format", _FORMATS)
    if storage is None:
        config.unread.clear()
        return {}
    groups = config.child("config_groups")
    if groups is None:
        config.error(
            "missing-key", "there are no `config_groups`, which say what is quantised and how", "config_groups"
        )
        return {}
    schemes: list[dict[str, Any]] = []
    chosen: set[str] = set()
    for name in groups.tree:
        group = groups.child(name)
        if group is None:
            groups.error("wrong-value", f"`{name}` is empty: schemes by name alone are not supported", name)
            continue
        chosen.update(_named(group, "targets", [*modules, *([head] if head else [])]))
        schemes.append(_scheme(group, storage))
    ignored = _named(config, "ignore", [*modules, *([head] if head else [])])
    if any(scheme != schemes[0] for scheme in schemes):
        config.error(
            "unsupported-value", "modules have different schemes, and one for all is supported", "config_groups"
        )
    if head in chosen - ignored:
        hint = "only linear layers inside the layers may be"
        config.error("unsupported-value", f"`{head}` is quantised, as `ignore` does not name it: {hint}", "ignore")
    skip = [name for name in modules if name in ignored or name not in chosen]
    return (schemes[0] if schemes else {}) | ({"skip": skip} if skip else {})


def write(quantization: Fp8 | PackQuantized) -> dict[str, Any]:
    """The fields of `quantization_config`."""
    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None
    if isinstance(quantization, Fp8):
        storage = "float-quantized"
        weights = _arguments("float", 8, quantization.scales)
        if quantization.activations != "none":
            dynamic = quantization.activations == "dynamic"
            inputs = _arguments("float", 8, "token" if dynamic else "tensor") | {"dynamic": dynamic}
    else:
        storage = "pack-quantized"
        grouped = quantization.group_size != -1
        weights = _arguments("int", quantization.bits, "group" if grouped else "channel")
        weights |= {"symmetric": quantization.sym, "actorder": "group" if quantization.desc_act else None}
        weights |= {"group_size": quantization.group_size} if grouped else {}
    group = {"targets": [_LINEAR], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *quantization.skip],
        "kv_cache_scheme": None,
    }


def _arguments(kind: str, bits: int, strategy: str) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False}


def _named(config: Config, key: str, modules: Sequence[str]) -> set[str]:
    """The modules that a list of names names."""
    found: set[str] = set()
    for name in config.names(key):
        if name.startswith("re:"):
            pattern = compiled(config, key, name.removeprefix("re:"))
            found.update(module for module in modules if pattern and pattern.match(module))
        else:
            found.update(module for module in modules if name in (module, _LINEAR))
    return found


def _scheme(group: Config, storage: str | None) -> dict[str, Any]:
    """One group's scheme, as the spec says it."""
    group.fixed("output_activations", None, why="outputs are never rounded")
    group.fixed("format", None, storage, why="one format for all modules is supported")
    weights, inputs = group.child("weights"), group.child("input_activations")
    if weights is None:
        group.error("missing-key", "`weights` says nothing: only quantised weights are supported", "weights")
        return {}
    for arguments in (weights, inputs):
        for key in _ARGUMENT_RECORDS:
            if arguments is not None:
                arguments.get(key)
    weights.fixed("dynamic", False, None, why="weights are rounded once")
    weights.fixed("block_structure", None, why="blocks are read in the format of Qwen3-*-FP8 alone")
    if storage == "pack-quantized":
        return _integers(weights, inputs)
    return _floats(weights, inputs)


def _integers(weights: Config, inputs: Config | None) -> dict[str, Any]:
    bits = weights.get("num_bits")
    weights.fixed("type", "int", why="pack-quantized holds integers")
    if bits not in (4, 8) or isinstance(bits, bool):
        weights.error(
            "wrong-value", f"pack-quantized is supported with 4 or 8 `num_bits`, not {shown(bits)}", "num_bits"
        )
    if inputs is not None:
        inputs.unread.clear()
        inputs.report.error("unsupported-value", "activations are never rounded to integers", inputs.path)
    strategy, group_size = weights.choice("strategy", ("group", "channel")), weights.get("group_size")
    if strategy == "group":
        group_size = weights.size("group_size")
    elif group_size not in (None, -1):
        weights.error("conflict", f"`strategy` is {strategy}, and `group_size` {shown(group_size)}", "group_size")
    order = weights.get("actorder")
    if order not in (None, False, "weight", "static", "group", "dynamic"):
        weights.error("wrong-value", f"`actorder` is {shown(order)}, not {listed(('weight', 'group'))}", "actorder")
    return {
        "scheme": "pack_quantized",
        "bits": bits,
        "group_size": group_size if strategy == "group" else -1,
        "sym": weights.flag("symmetric", True),
        "desc_act": order in ("group", "dynamic"),  # otherwise columns are where they were
    }


def _floats(weights: Config, inputs: Config | None) -> dict[str, Any]:
    found: dict[str, Any] = {"scheme": "fp8", "scales": weights.choice("strategy", ("channel", "tensor"))}
    for arguments in (weights, inputs):
        if arguments is not None:
            arguments.fixed("num_bits", 8, why="the other float formats are not implemented")
            arguments.fixed("type", "float", why="8-bit integers are read from pack-quantized alone")
            arguments.fixed("symmetric", True, None, why="float8 has no zero points")
            arguments.fixed("group_size", None, -1, why="groups of float8 are not implemented")
            arguments.fixed("actorder", None, False, why="groups of float8 are not implemented")
    if inputs is None:
        return found | {"activations": "none"}
    inputs.fixed("block_structure", None, why="activations have no blocks")
    dynamic = inputs.flag("dynamic", False)
    inputs.choice("strategy", ("token",) if dynamic else ("tensor",))
    return found | {"activations": "dynamic" if dynamic else "static"}
