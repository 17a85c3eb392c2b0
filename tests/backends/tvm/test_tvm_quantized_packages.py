"""Whole TVM packages with quantised weights: against the float64 reference, and how they load."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_parity.oracle import QWEN2, QWEN3, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package
from qwenspec.backend.registry import open_runner
from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Awq, Fp8Block, Gptq, Int4, Int8, Quantization
from qwenspec.verify.dequantize import Dequantized
from qwenspec.verify.reference import Reference
from qwenspec.verify.weights import save_checkpoint, stored_weights

RAGGED = {"hidden_size": 72, "intermediate_size": 88}  # no whole groups of 32, nor blocks of 20 × 24
WHOLE = {"hidden_size": 64, "intermediate_size": 96}
TIED = {"tie_word_embeddings": True}
SKIPPED = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
CASES: dict[str, tuple[Quantization, tuple[dict[str, Any], ...]]] = {
    "int4, int8 head, tied": (Int4(scheme="int4"), (QWEN3, RAGGED, TIED)),
    "int4, int4 head": (Int4(scheme="int4", group_size=64, head="int4"), (QWEN3, RAGGED)),
    "int8, some in full precision": (Int8(scheme="int8", head="none", skip=SKIPPED), (QWEN2, RAGGED)),
    "awq, biases": (Awq(scheme="awq", group_size=32), (QWEN2, WHOLE)),
    "gptq, groups in any order": (
        Gptq(scheme="gptq", bits=4, group_size=32, sym=False, desc_act=True, skip=SKIPPED),
        (QWEN2, WHOLE),
    ),
    "gptq int8": (Gptq(scheme="gptq", bits=8, group_size=-1), (QWEN3, WHOLE, TIED)),
    "fp8": (Fp8Block(scheme="fp8_block", block=(20, 24), activations="none"), (QWEN3, RAGGED)),
    "fp8, dynamic": (Fp8Block(scheme="fp8_block", block=(16, 32)), (QWEN3, RAGGED)),
}


def spec_of(name: str) -> Spec:
    scheme, changes = CASES[name]
    return tiny_spec(*changes).model_copy(update={"quantization": scheme})


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_references(name: str, tmp_path: Path) -> None:
    """Of a prompt in one forward, and of tokens one by one after it; fused parts' magnitudes differ 100 times."""
    spec = spec_of(name)
    weights = stored_weights(spec, 3)
    save_checkpoint(spec, weights, tmp_path / "weights", "float32", shards=2)
    runner = open_runner(emit(spec, "tvm", tmp_path), tmp_path / "weights", "cpu", "float32")
    cache = runner.create_paged_kv_cache(1, 64, 32)
    cache.add_sequence(0)
    ids = np.arange(18, dtype=np.int32) * 7 % spec.architecture.vocab_size
    cache.begin_forward([0], [14])
    rows = [runner.batch_verify(runner.embed(ids[:14]), cache)[0]]
    cache.end_forward()
    for token in ids[14:]:
        cache.begin_forward([0], [1])
        rows.append(runner.decode(runner.embed(np.array([token]))[:, None][0], cache)[0])
        cache.end_forward()
    want = Reference(spec, Dequantized(spec, weights)).logits(ids)
    # Where activations are rounded, float32's own rounding may send one that is almost between two numbers elsewhere.
    tolerance = 1e-3 if name == "fp8, dynamic" else 2e-6
    assert np.abs(np.concatenate(rows) - want).max() <= tolerance * np.abs(want).max()


def test_taps_are_the_references(tmp_path: Path) -> None:
    spec = spec_of("gptq, groups in any order")
    weights = stored_weights(spec, 4)
    save_checkpoint(spec, weights, tmp_path / "weights", "float32")
    runner = open_runner(emit(spec, "tvm", tmp_path), tmp_path / "weights", "cpu", "float32")
    cache = runner.create_paged_kv_cache(1, 64, 32)
    cache.add_sequence(0)
    ids = np.arange(9, dtype=np.int32)
    cache.begin_forward([0], [9])
    found, wanted = runner.taps(ids, cache), Reference(spec, Dequantized(spec, weights)).taps(ids)
    cache.end_forward()
    assert set(wanted) <= set(found)
    for address, want in wanted.items():
        error = np.abs(found[address].reshape(want.shape) - want).max()
        assert error <= 1e-5 * np.abs(want).max(), address


def test_what_is_not_a_number_is_refused(tmp_path: Path) -> None:
    spec = spec_of("fp8")
    weights = dict(stored_weights(spec, 3))
    broken = weights["model.layers.1.mlp.down_proj.weight"].copy()
    broken.view(np.uint8)[5, 6] = 0xFF
    weights["model.layers.1.mlp.down_proj.weight"] = broken
    save_checkpoint(spec, weights, tmp_path / "weights", "float32")
    module = import_package(emit(spec, "tvm", tmp_path))
    checkpoint = importlib.import_module(f"{module.__name__}.checkpoint").open_checkpoint(tmp_path / "weights")
    with pytest.raises(module.CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight: a value is not a number"):
        load(module, checkpoint)


def load(module: Any, checkpoint: Any) -> None:
    import tvm

    weights = importlib.import_module(f"{module.__name__}.weights")
    weights.load_parameters(checkpoint, described(module), tvm.cpu())


def described(module: Any) -> list[dict[str, Any]]:
    compiler, targets = (importlib.import_module(f"{module.__name__}.{name}") for name in ("compiler", "targets"))
    parameters: list[dict[str, Any]] = compiler.export("float32", targets.find_target("cpu"))[1]
    return parameters


MEASURE = """
import importlib, json, re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
import tvm
module = __import__(sys.argv[2])
checkpoint, weights = (importlib.import_module(f"{sys.argv[2]}.{name}") for name in ("checkpoint", "weights"))
tvm.runtime.tensor(np.ones(16, np.float32))
def peak():  # not getrusage: its maximum starts at what the parent process had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
tensors = weights.load_parameters(checkpoint.open_checkpoint(sys.argv[3]), json.loads(sys.argv[4]), tvm.cpu())
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("scheme", [Int4(scheme="int4"), Awq(scheme="awq")], ids=["int4", "awq"])
def test_no_matrix_is_ever_in_full_precision(scheme: Quantization, tmp_path: Path) -> None:
    """Memory peaks above the model by less than half of the largest matrix in float32, 268 MB."""
    sizes = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 1, "vocab_size": 256}
    spec = tiny_spec(QWEN3, sizes, TIED).model_copy(update={"quantization": scheme})
    package = emit(spec, "tvm", tmp_path)
    weights = stored_weights_of_one_value(package)
    save_checkpoint(spec, weights, tmp_path / "weights", "float32")
    parameters = described(import_package(package))
    command = [sys.executable, "-c", MEASURE, str(package.parent), package.name, str(tmp_path / "weights")]
    done = subprocess.run([*command, json.dumps(parameters)], capture_output=True, text=True, check=True)
    sizes_in_bytes = [int(np.prod(one["shape"])) * np.dtype(one["dtype"]).itemsize for one in parameters]
    assert 0.9 * sum(sizes_in_bytes) < int(done.stdout) < sum(sizes_in_bytes) + 2 * 16384 * 2048 * 4 / 2


def stored_weights_of_one_value(package: Path) -> dict[str, np.ndarray]:
    """Tensors of every name, shape and dtype that a package of one layer reads."""
    dtypes = {"I32": np.int32, "U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32}
    found: dict[str, np.ndarray] = {}
    for entry in json.loads((package / "MANIFEST.json").read_text())["parameters"]:
        for source in entry["sources"]:
            if isinstance(source, dict):
                for name, shape, allowed, _ in source["tensors"].values():
                    dtype = dtypes["F16" if "F16" in allowed else allowed[0]]
                    found[re.sub(r"\{i\}", "0", name)] = np.full(shape, 1, dtype)
            else:
                name, rows = source
                found[re.sub(r"\{i\}", "0", name)] = np.full((rows, *entry["shape"][1:]), 1, np.float32)
    return found
