"""What quantisation costs tiny-qwen3: the share of its held-out problems that each scheme answers.

    python benchmarks/quantization.py [--limit N] [--backend NAME ...] [--scheme NAME ...] [--dtype DTYPE] [--json FILE]

Checkpoints are made here from examples/tiny-qwen3: `int8` and `int4` as `qwenspec convert` makes them, the others in
their official layouts, by rounding to nearest with the smallest scales (no calibration, which would only be better).
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import accuracy
import ml_dtypes
import numpy as np
import tasks
from packages import ROOT
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import qwenspec
from qwenspec.backend.emit import emit
from qwenspec.backend.registry import open_runner
from qwenspec.convert.rounding import Error, round_rows
from qwenspec.ir.cost import kv_bytes_per_token, weight_bytes
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Fp8Format
from qwenspec.ir.quantized import head_format, weight_format
from qwenspec.spec.document import Spec
from qwenspec.verify.quantize import AWQ_NIBBLES, packed

TINY = ROOT / "examples" / "tiny-qwen3"

SCHEMES: dict[str, dict[str, Any]] = {
    "full precision": {},
    "int8": {"quantization": {"scheme": "int8"}},
    "int4, groups of 32": {"quantization": {"scheme": "int4", "group_size": 32}},
    "int4, groups of 32, int4 head": {"quantization": {"scheme": "int4", "group_size": 32, "head": "int4"}},
    "int4, groups of 128": {"quantization": {"scheme": "int4", "group_size": 128}},
    "awq": {"quantization": {"scheme": "awq"}},
    "gptq, 4 bits": {"quantization": {"scheme": "gptq", "bits": 4, "sym": False}},
    "gptq, 4 bits, desc_act": {"quantization": {"scheme": "gptq", "bits": 4, "sym": False, "desc_act": True}},
    "gptq, 8 bits": {"quantization": {"scheme": "gptq", "bits": 8}},
    "fp8_block": {"quantization": {"scheme": "fp8_block"}},
    "fp8_block, weights only": {"quantization": {"scheme": "fp8_block", "activations": "none"}},
    "KV fp8_e4m3": {"kv_cache": {"scheme": "fp8_e4m3"}},
    "KV fp8_e4m3, stored scales": {"kv_cache": {"scheme": "fp8_e4m3", "scales": "checkpoint"}},
    "KV int8": {"kv_cache": {"scheme": "int8"}},
    "int8 and KV int8": {"quantization": {"scheme": "int8"}, "kv_cache": {"scheme": "int8"}},
}


def spec_of(changes: Mapping[str, Any]) -> Spec:
    """tiny-qwen3 with another `quantization` or `kv_cache`."""
    spec = qwenspec.load(TINY / "spec.yaml")
    return Spec.model_validate(spec.model_dump(mode="json", by_alias=True) | dict(changes), strict=False)


def make_checkpoint(spec: Spec, folder: Path) -> Path:
    """tiny-qwen3 stored as the spec says."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "__pycache__"))
    tensors: dict[str, np.ndarray] = {}
    for name, values in load_file(TINY / "model.safetensors").items():
        tensors |= dict(_stored(spec, name, values))
    if spec.kv_cache is not None and getattr(spec.kv_cache, "scales", "") == "checkpoint":
        tensors |= {f"model.{name}": scale for name, scale in kv_scales().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def _stored(spec: Spec, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    quantization, module = spec.quantization, name.removesuffix(".weight")
    linear = module.endswith("_proj")
    is_head = module == spec.layout.lm_head and getattr(quantization, "head", "none") != "none"
    if quantization is None or not (linear or is_head):
        yield name, values
        return
    weight = values.astype(np.float32)
    format = head_format(quantization) if is_head else weight_format(quantization)
    if isinstance(format, Fp8Format):
        suffixes = _fp8(weight, *format.block)
    elif format.packing in ("int8", "int4"):
        suffixes = round_rows(weight, format, Error())
    else:
        suffixes = _groups(weight, quantization)
    for suffix, tensor in suffixes.items():
        yield f"{module}.{suffix}", np.ascontiguousarray(tensor)  # safetensors writes memory as it lies


def _fp8(weight: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    blocks = weight.reshape(len(weight) // height, height, -1, width)
    scales = np.abs(blocks).max(axis=(1, 3)) / np.float32(448)
    q = (blocks / scales[:, None, :, None]).reshape(weight.shape).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": q, "weight_scale_inv": scales}


def _groups(weight: np.ndarray, quantization: Any) -> dict[str, np.ndarray]:
    """AWQ and GPTQ: asymmetric ones reach from the smallest weight of a group to the largest."""
    bits, size, columns = quantization.bits, quantization.group_size, weight.shape[1]
    is_awq, most = quantization.scheme == "awq", (1 << quantization.bits) - 1
    order = np.arange(columns)
    if not is_awq and quantization.desc_act:
        order = np.argsort(-np.abs(weight).mean(axis=0), kind="stable")  # the largest inputs are quantised together
    g_idx = np.empty(columns, np.int32)
    g_idx[order] = np.arange(columns) // size
    grouped = weight[:, order].reshape(len(weight), -1, size)
    if is_awq or not quantization.sym:
        low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
        scales = ((high - low) / most).astype(np.float16)
        zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 0 if is_awq else 1, most).astype(np.int64)
    else:
        scales = (2 * np.abs(grouped).max(axis=2) / most).astype(np.float16)
        zeros = np.full(scales.shape, 1 << (bits - 1))
    by_input = scales.astype(np.float32)[:, g_idx]
    q = np.clip(np.rint(weight / by_input) + zeros[:, g_idx], 0, most).astype(np.int64)
    if is_awq:
        words = {"qweight": packed(q.T, 4, 1, AWQ_NIBBLES), "qzeros": packed(zeros.T, 4, 1, AWQ_NIBBLES)}
    else:
        words = {"qweight": packed(q.T, bits, 0), "qzeros": packed(zeros.T - 1, bits, 1), "g_idx": g_idx}
    return words | {"scales": scales.T}


@functools.cache
def kv_scales() -> dict[str, np.ndarray]:
    """`layers.0.self_attn.k_scale`, … for keys and values twice as large as those of some prompts."""
    spec, prompts = qwenspec.load(TINY / "spec.yaml"), [tasks.chat(p.question) for p in tasks.held_out_problems(4)]
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    kv_size = lower(spec).layers[0].mixer.num_kv_heads * lower(spec).layers[0].mixer.head_dim
    largest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        runner = open_runner(emit(spec, "triton", folder), TINY, "cpu", "float32")
        for number, prompt in enumerate(prompts):
            ids = np.array(tokenizer.encode(prompt).ids, np.int32)
            cache = runner.create_paged_kv_cache(1, 512, 512)
            cache.add_sequence(number)
            cache.begin_forward([number], [len(ids)])
            taps = runner.taps(ids, cache)
            cache.end_forward()
            for i in range(spec.architecture.num_hidden_layers):
                values = taps[f"layers.{i}.attention.qkv_proj"][:, -kv_size:]
                for name, x in (("k", taps[f"layers.{i}.attention.k"]), ("v", values)):
                    address = f"layers.{i}.self_attn.{name}_scale"
                    largest[address] = max(largest.get(address, 0.0), float(np.abs(x).max()))
    return {address: np.float32([2 * x / 448]) for address, x in largest.items()}


def measure(spec: Spec, backend: str, problems: list[Any], dtype: str) -> float:
    """The share of problems that are right, the mean of tasks and of prompt formats."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_checkpoint(spec, folder / "checkpoint")
        # Packages are imported by their name, and one process imports many.
        variant = f"tiny-{abs(hash(folder.name)):x}"
        package = emit(spec.model_copy(update={"variant": variant}), backend, folder)
        generate = accuracy.greedy(package, checkpoint, "cpu", dtype)
        shares = [tasks.accuracy(generate, problems, prompt) for prompt in tasks.FORMATS.values()]
    return float(np.mean([share for of_form in shares for share in of_form.values()]))


def main() -> None:
    """Measure and print a table, the schemes by row and the backends by column."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="problems of each task (default: 100)")
    parser.add_argument("--backend", nargs="+", default=["triton", "tvm"], metavar="NAME")
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES), choices=list(SCHEMES), metavar="NAME")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    problems = tasks.held_out_problems(args.limit)
    print(f"{len(problems)} problems in {len(tasks.FORMATS)} formats, {args.dtype}")
    print(f"{'scheme':30s} {'weights':>10s} {'KV a token':>10s}" + "".join(f"{name:>8s}" for name in args.backend))
    found: dict[str, dict[str, float]] = {}
    for name in args.scheme:
        spec = spec_of(SCHEMES[name])
        model = lower(spec)
        found[name] = {backend: measure(spec, backend, problems, args.dtype) for backend in args.backend}
        shares = "".join(f"{share:8.1%}" for share in found[name].values())
        print(f"{name:30s} {weight_bytes(model):10,d} {kv_bytes_per_token(model):10,d}{shares}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
