"""`quantization_config` in config.json, both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qwenspec.hf import compressed_tensors, gptq_dynamic, modelopt, unsupported
from qwenspec.hf.config import Config, shown
from qwenspec.hf.patterns import compiled
from qwenspec.ir import weights
from qwenspec.spec.checkpoint import Layout
from qwenspec.spec.quantization import Awq, Fp8, Fp8Block, Gptq, Int4, Int8, PackQuantized, Quantization

COMPRESSED_TENSORS = "compressed-tensors"
OURS = "qwenspec"  # the `quant_method` of `qwenspec convert`

_UP_TO_A_DOT = r"(?:(?<=\.)|(?=\.|$))"  # "layers.1" is no beginning of "layers.11"

# How the file was quantised, or which kernel runs it: nothing that the stored numbers do not already say.
_RECORDS = (
    "act_group_aware",
    "amp",
    "autoround_version",
    "backend",
    "batch_size",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "do_fuse",
    "dynamic_max_gap",
    "enable_minmax_tuning",
    "enable_norm_bias_tuning",
    "enable_quanted_input",
    "exllama_config",
    "fuse_max_seq_len",
    "gradient_accumulate_steps",
    "iters",
    "low_cpu_mem_usage",
    "low_gpu_mem_usage",
    "lr",
    "lr_scheduler",
    "max_input_length",
    "meta",
    "minmax_lr",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_to_fuse",
    "not_use_best_mse",
    "nsamples",
    "pad_token_id",
    "provider",
    "quant_nontext_module",
    "quantizer",
    "sampler",
    "scale_dtype",
    "seqlen",
    "static_groups",
    "tokenizer",
    "train_bs",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
)


def read(config: Config, layout: Layout, num_layers: int, has_head: bool = False) -> dict[str, Any] | None:
    """The spec's `quantization`, None in full precision. The checkpoint's modules have the layout's names.

    has_head: there is an LM head that is not the embedding"""
    quantized = config.child("quantization_config")
    if quantized is None or unsupported.reported(quantized):
        return None
    method = quantized.choice("quant_method", (*_READERS, COMPRESSED_TENSORS, modelopt.METHOD))
    for key in _RECORDS:
        quantized.get(key)
    if method is None:
        quantized.unread.clear()
        return None
    quantized.fixed("is_checkpoint_fp8_serialized", True, None, why="the checkpoint would not be quantised yet")
    modules = weights.linears(layout, num_layers)
    for key in ("block_name_to_quantize", "to_quant_block_names"):
        _all_blocks(quantized, key, modules)
    if method == COMPRESSED_TENSORS:
        return compressed_tensors.read(quantized, modules, layout.lm_head if has_head else None)
    if method == modelopt.METHOD:
        return modelopt.read(quantized, modules, layout.lm_head if has_head else None)
    if method == OURS:  # others never quantise these
        modules += [layout.embedding, layout.lm_head]
    return _READERS[method](quantized, modules)


def write(quantization: Quantization | None) -> dict[str, Any]:
    """The keys of config.json for a quantisation that `lacks` says nothing of."""
    fields: dict[str, Any]
    match quantization:
        case Fp8Block(block=block, skip=skip):
            fields = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(block),
                "modules_to_not_convert": list(skip) or None,
            }
        case Fp8() | PackQuantized():
            fields = compressed_tensors.write(quantization)
        case Awq(bits=bits, group_size=group_size, skip=skip):
            fields = {
                "quant_method": "awq",
                "version": "gemm",
                "bits": bits,
                "group_size": group_size,
                "zero_point": True,
                "modules_to_not_convert": list(skip) or None,
            }
        case Gptq(skip=skip):
            fields = {"quant_method": "gptq", **quantization.model_dump(exclude={"scheme", "skip"})}
            if skip:
                fields["dynamic"] = gptq_dynamic.rules(skip)
        case Int8(skip=skip) | Int4(skip=skip):
            fields = {
                "quant_method": OURS,
                **quantization.model_dump(exclude={"skip"}),
                "modules_to_not_convert": list(skip) or None,
            }
        case None:
            return {}
    return {"quantization_config": fields}


def lacks(quantization: Quantization | None) -> list[str]:
    """What of it config.json has no words for."""
    match quantization:
        case Fp8Block(activations="none"):
            return ["quantization.activations: none"]
        case _:
            return []


def matching(entry: str, modules: Sequence[str]) -> list[str]:
    """The modules that `convert --skip` names: by a whole name, the beginning of one up to a dot, or the end of one."""
    return [name for name in modules if f"{name}.".startswith(f"{entry}.") or name.endswith(entry)]


def _fp8(config: Config, linears: Sequence[str]) -> dict[str, Any]:
    config.fixed("fmt", "e4m3", None, why="the other float8 formats are not implemented")
    config.fixed("scale_fmt", "float", None, why="scales are read as floats alone")
    config.fixed("expert_dtype", "fp8", None, why="there are no experts")
    config.fixed("dequantize", False, None, why="weights are multiplied as they are stored")
    config.fixed("modules_to_convert", None, [], why="linear layers alone are quantised")
    config.choice("activation_scheme", ("dynamic",), "dynamic")
    block = config.get("weight_block_size")
    if block is None:
        message = "there is no `weight_block_size`, and scales of whole tensors or rows are not implemented"
        config.error("unsupported-value", message, "weight_block_size")
    elif not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        config.error("wrong-value", "`weight_block_size` is not two positive numbers", "weight_block_size")
    return {"scheme": "fp8_block", "block": block, "activations": "dynamic"} | _skip(config, linears)


def _awq(config: Config, linears: Sequence[str]) -> dict[str, Any]:
    config.fixed("version", "gemm", "GEMM", why="the other AWQ layouts are packed differently")
    config.fixed("format", "gemm", None, why="the other AWQ layouts are packed differently")
    config.fixed("desc_act", False, None, why="AWQ's inputs are in their own order")
    config.fixed("data_type", "int", None, why="AWQ's values are integers")
    config.fixed("modules_in_block_to_quantize", None, why="AWQ names what it leaves alone in modules_to_not_convert")
    config.fixed("checkpoint_format", "gemm", None, why="the other AWQ layouts are packed differently")
    config.get("sym")  # zero_point says it: transformers' own class writes true beside zero points
    config.fixed("zero_point", True, why="AWQ without zero points is another format")
    bits, group_size = config.get("bits"), config.size("group_size")
    if bits != 4:
        config.error("wrong-value", "AWQ has 4 `bits`", "bits")
    _as_gptqmodel_writes(config, "awq")
    common = {"bits": bits, "group_size": group_size, "sym": config.get("sym"), "desc_act": False}
    left = gptq_dynamic.excluded(config, linears, common)
    named = _named(config, linears)
    skip = [name for name in linears if name in named or name in left]
    return {"scheme": "awq", "bits": bits, "group_size": group_size} | ({"skip": skip} if skip else {})


def _as_gptqmodel_writes(config: Config, method: str) -> None:
    """The keys that GPTQModel adds to those of either method."""
    config.fixed("lm_head", False, None, why="the LM head is always in full precision")
    config.fixed("pack_dtype", "int32", None, why="other packings are not implemented")
    config.fixed("method", method, None, why="it is the same key as quant_method")


def _gptq(config: Config, linears: Sequence[str]) -> dict[str, Any]:
    _as_gptqmodel_writes(config, "gptq")
    config.fixed("is_marlin_format", False, None, why="Marlin's layout is packed differently")
    config.fixed("data_type", "int", None, why="GPTQ's values are integers")
    found: dict[str, Any] = {
        "scheme": "gptq",
        "bits": config.get("bits"),
        "group_size": config.get("group_size"),
    }
    if found["bits"] not in (4, 8):
        config.error("wrong-value", "GPTQ is supported with 4 or 8 `bits`", "bits")
    if found["group_size"] != -1:
        config.size("group_size")
    found["sym"], found["desc_act"] = config.flag("sym", True), config.flag("desc_act", False)
    for key in ("format", "checkpoint_format"):  # GPTQModel renames the second to the first, and writes both
        if config.get(key) is not None:
            config.fixed(key, found.get("checkpoint_format", config.get(key)), why="the two names of one key differ")
            found["checkpoint_format"] = config.choice(key, ("gptq", "gptq_v2"))
    common = {key: found[key] for key in ("bits", "group_size", "sym", "desc_act")}
    skip = gptq_dynamic.excluded(config, linears, common)
    # Names inside a layer, in groups by the order of quantisation; whatever is not among them was left alone.
    if inside := config.names("modules_in_block_to_quantize"):
        chosen = tuple(f".{name}" for name in inside)
        skip = [name for name in linears if name in skip or not name.endswith(chosen)]
    return found | ({"skip": skip} if skip else {})


def _ours(config: Config, modules: Sequence[str]) -> dict[str, Any]:
    scheme = config.choice("scheme", ("int8", "int4"))
    heads = ("none", "int8", "int4") if scheme == "int4" else ("none", "int8")
    group = {"group_size": config.size("group_size")} if scheme == "int4" else {}
    return {"scheme": scheme, **group, "head": config.choice("head", heads)} | _skip(config, modules)


_READERS: dict[str, Callable[[Config, Sequence[str]], dict[str, Any]]] = {
    "fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
    OURS: _ours,
}


def _all_blocks(config: Config, key: str, linears: Sequence[str]) -> None:
    """Layers that were quantised, as a list of names or with commas between them: all are, where it says anything."""
    blocks = tuple(f"{name.strip()}." for names in config.names(key) for name in names.split(",") if name.strip())
    if blocks and (left := next((name for name in linears if not name.startswith(blocks)), None)):
        message = f"`{key}` is {shown(config.get(key))}, which leaves out {left}"
        hint = "whole layers in full precision are read from the keys that name what was left out alone"
        config.error("unsupported-value", message, key, hint)


def _skip(config: Config, modules: Sequence[str]) -> dict[str, Any]:
    """`modules_to_not_convert` as the spec's `skip`. What is never quantised needs no entry."""
    named = _named(config, modules)
    return {"skip": [name for name in modules if name in named]} if named else {}


def _named(config: Config, modules: Sequence[str]) -> set[str]:
    """The modules that `modules_to_not_convert` names."""
    key, other = "modules_to_not_convert", "ignored_layers"  # two names of one key
    skipped, ignored = config.names(key), config.names(other)
    if config.get(key) is None:
        key, skipped = other, ignored
    # As transformers' should_convert_module: a regular expression of a name's beginning, or a name's end as it is.
    patterns = [(entry, compiled(config, key, entry, _UP_TO_A_DOT)) for entry in skipped]
    return {
        name
        for name in modules
        for entry, pattern in patterns
        if name.endswith(entry) or (pattern and pattern.match(name))
    }
