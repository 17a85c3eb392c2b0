"""Triton packages with a quantised KV cache, on the CPU: what is in the cache, and what comes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

import qwenspec
from backends.test_taps import WORKLOAD
from backends.test_triton_cache import Machine, new_cache, state
from hf_parity.oracle import QWEN3, Oracle, some_ids, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package
from qwenspec.ir.cost import kv_bytes_per_token
from qwenspec.spec.document import Spec
from qwenspec.verify.contenders import PackageContender, ReferenceContender
from qwenspec.verify.steps import Add, CacheSizes, Fork, Forward, Popn, Step

KV: dict[str, dict[str, str]] = {
    "int8": {"scheme": "int8"},
    "fp8": {"scheme": "fp8_e4m3"},
    "fp8_stored": {"scheme": "fp8_e4m3", "scales": "checkpoint"},
}
SCALES = 0.05, 0.02  # of keys and values in the first layer; in the second they are twice as large
SIZES = CacheSizes(page_size=4, pages=48, max_batch_size=4, chunk=64)
STEPS: list[Step] = [
    *WORKLOAD,
    Fork(0, 2, 6),
    Forward({0: (50,), 1: (51,), 2: (52,)}),
    Popn(1, 6),
    Forward({1: (60, 61, 62), 2: (63, 64)}),
    Add(3),
    Forward({3: (1, 2, 3, 4, 5), 1: (65,)}),
]
# Float32 and float64 round a few numbers to different bytes, which shows in few rows.
USUAL, WORST = 1e-5, 2e-2


def spec_of(kv: str, *changes: dict[str, Any]) -> Spec:
    window = {"attention": {"sliding_window": {"window": 6, "layers": [0]}}}
    spec = tiny_spec(QWEN3, window, *changes)
    return Spec.model_validate(spec.model_dump(by_alias=True) | {"kv_cache": KV.get(kv)})


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """opened(kv, dtype) -> spec, checkpoint, runner; kv "" is the same model unquantised."""

    def open_package(kv: str, dtype: str = "float32") -> tuple[Spec, dict[str, np.ndarray], Any]:
        spec = spec_of(kv)
        oracle = Oracle(spec)
        if kv == "fp8_stored":
            for i in range(2):
                for part, scale, shape in zip("kv", SCALES, ((), (1,)), strict=True):
                    name = f"model.layers.{i}.self_attn.{part}_scale"
                    oracle.state[name] = torch.full(shape, scale * (i + 1))
        weights = oracle.save(tmp_path_factory.mktemp("weights"))
        package = emit(spec, "triton", tmp_path_factory.mktemp("package"))
        return spec, oracle.weights(), qwenspec.open_runner(package, weights, dtype=dtype)

    return open_package


def errors(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Each row's, of its length."""
    expected = expected.reshape(len(expected), -1)
    return np.linalg.norm(actual.reshape(len(actual), -1) - expected, axis=1) / np.linalg.norm(expected, axis=1)


def logits(runner: Any, ids: np.ndarray, chunk: int) -> np.ndarray:
    """Of every token of one sequence; a chunk of 1 is decoded."""
    cache = runner.create_paged_kv_cache(1, 64, 64, page_size=4)
    cache.add_sequence(0)
    found = []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        cache.begin_forward([0], [len(part)])
        embeds = runner.embed(part)
        found.append(runner.decode(embeds, cache)[0] if chunk == 1 else runner.batch_verify(embeds, cache)[0])
        cache.end_forward()
    return np.concatenate(found)


@pytest.mark.parametrize("kv", KV)
def test_every_module_of_every_forward(kv: str, opened: Any) -> None:
    """As the reference says, which quantises too: chunks, decoding, trees, a fork, a rollback."""
    spec, weights, runner = opened(kv)
    reference = ReferenceContender(spec, weights)
    tapped, plain = (PackageContender("triton", runner, SIZES) for _ in range(2))
    for step in STEPS:
        found = plain.do(step)
        if not isinstance(step, Forward):
            reference.do(step)
            tapped.do(step)
            continue
        expected, actual = reference.taps(step), tapped.taps(step)
        assert list(actual) == list(expected)
        for address, output in expected.items():
            wrong = errors(actual[address], output)
            assert np.median(wrong) < USUAL, address
            assert wrong.max() < WORST, address
        np.testing.assert_array_equal(actual["logits"], found)


@pytest.mark.parametrize(
    ("kv", "least", "most"), [("int8", 1e-3, 2e-2), ("fp8", 5e-3, 1e-1), ("fp8_stored", 5e-3, 1e-1)]
)
def test_what_quantisation_changes(kv: str, least: float, most: float, opened: Any) -> None:
    """It is used, and does little harm."""
    spec, _, runner = opened(kv)
    ids = some_ids(spec, 40)
    lost = errors(logits(runner, ids, 40), logits(opened("")[2], ids, 40))
    assert least < np.median(lost) < most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv", KV)
def test_chunks_do_not_matter(kv: str, dtype: str, opened: Any) -> None:
    """Whole, in chunks or token by token."""
    spec, _, runner = opened(kv, dtype)
    ids = some_ids(spec, 40)
    whole = logits(runner, ids, 40)
    for chunk in (1, 7, 16):
        difference = errors(logits(runner, ids, chunk), whole)
        usual, worst = (USUAL, WORST) if dtype == "float32" else (2e-2, 1e-1)
        assert np.median(difference) < usual
        assert difference.max() < worst


@pytest.mark.parametrize("kv", KV)
def test_bytes_a_token(kv: str, opened: Any) -> None:
    """Of the cache's tensors: what `cost` says, and about half of what bfloat16 takes."""

    def measured(kv: str) -> float:
        cache = opened(kv, "bfloat16")[2].create_paged_kv_cache(1, 64, 64, page_size=4)
        return sum(x.nbytes for x in vars(cache).values() if isinstance(x, torch.Tensor)) / 64

    model = qwenspec.lower(spec_of(kv))
    assert measured(kv) == kv_bytes_per_token(model)
    plain = dataclasses.replace(model, kv_cache=None, dtype="bfloat16")
    assert measured("") == kv_bytes_per_token(plain)
    head_dim = model.layers[0].mixer.head_dim
    assert measured(kv) / measured("") == (head_dim + 4 * (kv != "fp8_stored")) / (2 * head_dim)


def test_stored_scales_stay_float32(opened: Any) -> None:
    model = opened("fp8_stored", "bfloat16")[2].model
    for i, layer in enumerate(model.layers):
        for scale, stored in zip((layer.attention.k_scale, layer.attention.v_scale), SCALES, strict=True):
            assert scale.dtype == torch.float32
            assert scale.tolist() == torch.full((1,), stored * (i + 1)).tolist()


# ------------------------------------------------------------------------------------------------- pages and scales


class ScaledMachine(Machine):
    """Each token's scale is its number, too, and lies where its bytes do."""

    def new_cache(self, pages: int, page_size: int) -> Any:
        cache = new_cache(self.module, pages, page_size)
        cache.pages.fill_(127)
        cache.scales.fill_(torch.nan)
        return cache

    def write(self, numbers: list[int]) -> None:
        slots, new = self.cache.open_batch(len(numbers)).slots, torch.tensor(numbers)
        self.cache.scales.flatten(2, 3)[:, :, slots] = new.float()[:, None]
        self.cache.pages.flatten(2, 3)[:, :, slots] = (new % 100).to(torch.int8)[:, None, None]

    def read(self, seq: int) -> list[float]:
        pages, length = self.cache.sequences._sequences[seq].pages, self.cache.length(seq)
        numbers: list[float] = self.cache.scales[1, 1][pages].flatten(0, 1)[:length, -1].tolist()
        scaled = self.cache.pages[1, 1][pages].flatten(0, 1)[:length, -1, -1].tolist()
        assert scaled == [number % 100 for number in numbers]
        return numbers

    def state(self) -> object:
        return state(self.cache), self.cache.scales.nan_to_num(-1).tolist()


def test_cache_behaves_as_lists_of_tokens(tmp_path: Path) -> None:
    module: ModuleType = import_package(emit(spec_of("int8"), "triton", tmp_path))
    ScaledMachine.module, ScaledMachine.out_of_pages = module, module.OutOfPages
    ScaledMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
    ScaledMachine.TestCase("runTest").runTest()


def test_no_trace_in_other_packages(tmp_path: Path) -> None:
    """Nor of scales for each token where the layer has one."""
    plain = {file.name: file.read_text() for file in emit(spec_of(""), "triton", tmp_path / "plain").rglob("*.py")}
    assert not {"quantized_kv.py", "e4m3.py"} & set(plain)
    assert not [name for name, text in plain.items() if "k_scale" in text or "QUANTIZED_KV" in text]
    stored = emit(spec_of("fp8_stored"), "triton", tmp_path / "stored")
    assert "scale" not in (stored / "cache.py").read_text()
    assert not (emit(spec_of("int8"), "triton", tmp_path / "int8") / "kernels" / "e4m3.py").exists()
