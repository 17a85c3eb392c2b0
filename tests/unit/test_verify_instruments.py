"""What is said to have run is what ran: kernels by name, in packages of both backends and in Triton's interpreter."""

from __future__ import annotations

import cProfile
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_parity.oracle import QWEN3, Oracle, tiny_spec
from qwenspec.backend.api import Cache, Runner
from qwenspec.backend.emit import emit
from qwenspec.backend.registry import open_runner
from qwenspec.verify.instruments import counting

LAYERS = 2


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runner]:
    """A backend's name -> a new runner of one tiny model."""
    folder, oracle = tmp_path_factory.mktemp("packages"), Oracle(tiny_spec(QWEN3))
    weights = oracle.save(folder / "weights")
    return lambda backend: open_runner(emit(oracle.spec, backend, folder), weights, "cpu", None)


def forward(runner: Runner, cache: Cache, method: str, ids: list[int], parents: list[int] | None = None) -> np.ndarray:
    """Of sequence 0."""
    cache.begin_forward([0], [len(ids)], parents)
    try:
        return np.asarray(getattr(runner, method)(runner.embed(np.array(ids, np.int32)), cache))
    finally:
        cache.end_forward()


def ran_in_each_forward(runner: Runner, ran: Counter[str]) -> dict[str, dict[str, int]]:
    """What a prompt, a second part of it, a token, one more and a tree of tokens run, one after the other."""
    cache = runner.create_paged_kv_cache(2, 64, 32, 4)
    cache.add_sequence(0)
    steps: dict[str, tuple[str, list[int], list[int] | None]] = {
        "prompt": ("prefill", [1, 2, 3, 4, 5], None),
        "second part": ("prefill", [6, 7, 8], None),
        "token": ("decode", [9], None),
        "one more": ("decode", [10], None),
        "tree": ("batch_verify", [11, 12, 13], [-1, -1, 0]),
    }
    found = {}
    for name, step in steps.items():
        ran.clear()
        forward(runner, cache, *step)
        found[name] = dict(ran)
    return found


def test_a_triton_package_on_cpus(opened: Callable[[str], Runner]) -> None:
    runner, ran = opened("triton"), Counter[str]()
    names = counting(runner, lambda name: ran.update([name]))
    shared = {"linear": 4 * LAYERS + 1, "rms_norm": 1, "add_rms_norm": 2 * LAYERS}
    shared |= {"rotate_and_cache": LAYERS, "act_and_mul": LAYERS}
    prefill, decode = shared | {"prefill_attention": LAYERS}, shared | {"decode_attention": LAYERS}
    steps = ["prompt", "second part", "token", "one more", "tree"]
    expected = dict(zip(steps, [prefill, prefill, decode, decode, prefill], strict=True))
    assert ran_in_each_forward(runner, ran) == expected
    assert names == prefill.keys() | decode.keys()


def test_a_tvm_package(opened: Callable[[str], Runner]) -> None:
    runner, ran = opened("tvm"), Counter[str]()
    names = counting(runner, lambda name: ran.update([name]))
    shared = {"linear": 4 * LAYERS + 1, "rms_norm": 1, "add_rms_norm": 2 * LAYERS, "rotate": LAYERS}
    shared |= {"act_and_mul": LAYERS, "take_rows": 1, "rotary_tables": 1}
    shared |= {"split_qkv": LAYERS, "append_to_pages": LAYERS}
    prefill = shared | {"last_row": 1, "ragged_prefill_attention": LAYERS}
    # Tokens before the new ones are in pages: their part of the sum is joined to the others'.
    paged = {"paged_prefill_attention": LAYERS, "merge_attention": LAYERS}
    decode = shared | {"decode_attention": LAYERS}
    found = ran_in_each_forward(runner, ran)
    assert found["prompt"] == prefill
    assert found["second part"] == prefill | paged
    assert found["token"] == found["one more"] == decode  # the first of them is watched, the second as it was
    assert found["tree"] == shared | paged | {"tree_attention": LAYERS}
    seen = {name for one in found.values() for name in one}
    assert names == seen | {"copy_page", "compact_pages", "get_keys_and_values"}


def test_a_fork_in_the_middle_of_a_page_copies_it(opened: Callable[[str], Runner]) -> None:
    runner, ran = opened("tvm"), Counter[str]()
    counting(runner, lambda name: ran.update([name]))
    cache = runner.create_paged_kv_cache(3, 64, 32, 4)
    cache.add_sequence(0)
    forward(runner, cache, "prefill", [1, 2, 3, 4, 5])
    ran.clear()
    cache.fork_sequence(0, 1, 4)
    assert not ran
    cache.fork_sequence(0, 2, 3)
    assert ran == {"copy_page": LAYERS}


@pytest.mark.parametrize("backend", ["triton", "tvm"])
def test_results_are_as_before(opened: Callable[[str], Runner], backend: str) -> None:
    plain, counted = opened(backend), opened(backend)
    counting(counted, lambda _: None)
    results = []
    for runner in (plain, counted):
        cache = runner.create_paged_kv_cache(2, 64, 32, 4)
        cache.add_sequence(0)
        rows = [forward(runner, cache, "batch_verify", ids) for ids in ([1, 2, 3, 4, 5], [6, 7, 8], [9])]
        results.append(np.concatenate([row[0] for row in rows]))
    assert np.array_equal(*results)


@pytest.mark.parametrize("backend", ["triton", "tvm"])
def test_counting_costs_little(opened: Callable[[str], Runner], backend: str) -> None:
    """Less than the step of a tiny model itself: in calls, which are as many on any machine."""

    def calls_of_a_step(runner: Runner) -> int:
        cache = runner.create_paged_kv_cache(2, 256, 32, 4)
        cache.add_sequence(0)
        forward(runner, cache, "decode", [1])
        profile = cProfile.Profile()
        profile.runcall(forward, runner, cache, "decode", [1])
        return sum(entry.callcount for entry in profile.getstats())

    runner = opened(backend)
    before = calls_of_a_step(runner)
    counting(runner, list[str]().append)
    assert calls_of_a_step(runner) < 2 * before


INTERPRETED = """
import json, sys
from collections import Counter
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import triton_interpreter
from qwenspec.backend.registry import open_runner
from qwenspec.verify.instruments import counting
from test_verify_instruments import ran_in_each_forward
runner, ran = open_runner(Path(sys.argv[3]), Path(sys.argv[4]), "cpu", None), Counter()
names = counting(runner, lambda name: ran.update([name]))
print(json.dumps([sorted(names), ran_in_each_forward(runner, ran)]))
"""


def test_a_triton_package_in_the_interpreter(tmp_path: Path) -> None:
    """TRITON_INTERPRET decides for a whole process, so this is one of its own."""
    tests = Path(__file__).parents[1]
    oracle = Oracle(tiny_spec(QWEN3))
    package, weights = emit(oracle.spec, "triton", tmp_path), oracle.save(tmp_path / "weights")
    paths = [tests / "unit", tests / "backends" / "kernels", package, weights]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED, *map(str, paths)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names, found = json.loads(done.stdout)
    shared = {"_rms_norm_kernel": 1, "_add_rms_norm_kernel": 2 * LAYERS}
    shared |= {"_rotate_and_cache_kernel": LAYERS, "_act_and_mul_kernel": LAYERS}
    prefill, decode = shared | {"_prefill_kernel": LAYERS}, shared | {"_decode_split_kernel": LAYERS}
    assert found == {"prompt": prefill, "second part": prefill, "token": decode, "one more": decode, "tree": prefill}
    # A context this short is not split, so nothing is joined.
    assert set(names) == prefill.keys() | decode.keys() | {"_decode_join_kernel"}


def test_a_runner_of_another_backend() -> None:
    """Nothing is known of its kernels, and it works without."""

    class OtherRunner:
        pass

    other: Any = OtherRunner()
    assert counting(other, lambda _: None) == frozenset()
