"""The paged KV cache of the TVM packages: TVM's object under random use, held to the same account as Triton's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tvm
from attention_cache import compiled
from hypothesis import settings
from tvm_ffi import Shape

from backends.cache_machine import CacheMachine
from qwenspec.backend.fold import declared_flags, fold
from qwenspec.backend.load import import_package
from qwenspec.backend.package import HERE as COMMON
from qwenspec_tvm.emit import HERE

HEADS, KV_HEADS, HEAD_DIM = 2, 1, 16
PLAIN = dict.fromkeys(
    (
        "SLIDING",
        "EVERY_LAYER_SLIDES",
        "EVICTS",
        "DYNAMIC_ROPE",
        "FROZEN_ROPE",
        "QUANTIZED_KV",
        "GPU_TENSORS",
    ),
    False,
)
CONFIG = SimpleNamespace(
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    sliding_window=4,
    layer_windows=(None, 4),
)


def package(folder: Path, **flags: bool) -> ModuleType:
    """The cache of a package, without the rest of it."""
    files = [COMMON / "runtime" / f"{name}.py" for name in ("checks", "sequences")]
    for file in (HERE / "runtime" / "cache.py", *files):
        text = file.read_text(encoding="utf-8")
        folded = fold(text, {name: value for name, value in (PLAIN | flags).items() if name in declared_flags(text)})
        (folder / file.name).write_text(folded, encoding="utf-8")
    (folder / "config.py").write_text("class Config: ...\n", encoding="utf-8")
    (folder / "__init__.py").write_text(
        "from .cache import PagedKVCache\nfrom .sequences import OutOfPages\n", encoding="utf-8"
    )
    return import_package(folder)


def new_cache(module: ModuleType, pages: int = 7, page_size: int = 4, **options: object) -> Any:
    return module.PagedKVCache(
        config=CONFIG,
        create=compiled(HEADS, KV_HEADS, HEAD_DIM, (None, None), "float32")["create_paged_kv_cache"],
        max_batch_size=4,
        max_total_seq_len=pages * page_size,
        prefill_chunk_size=16,
        page_size=page_size,
        dtype="float32",
        **{"device": tvm.cpu(), **options},
    )


def ask(cache: Any, name: str, *arguments: object) -> Any:
    return tvm.get_global_func(f"vm.builtin.attention_kv_cache_{name}")(cache.state, *arguments)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TVM_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return package(tmp_path_factory.mktemp("plain"))


class Machine(CacheMachine):
    """Keys are the numbers and values minus them, cached by attention."""

    module: ModuleType

    def new_cache(self, pages: int, page_size: int) -> Any:
        return new_cache(self.module, pages, page_size)

    def write(self, numbers: list[int]) -> None:
        self.cache.check_open(len(numbers))
        qkv = np.zeros((len(numbers), HEADS + 2 * KV_HEADS, HEAD_DIM), np.float32)
        qkv[:, HEADS:] = np.array(numbers, np.float32)[:, None, None]
        qkv[:, HEADS + KV_HEADS :] *= -1
        machine = compiled(HEADS, KV_HEADS, HEAD_DIM, (None, None), "float32")
        for layer in ("first", "second"):
            machine[layer](tvm.runtime.tensor(qkv), self.cache.state)

    def read(self, seq: int) -> list[float]:
        self.agrees_with_tvm(seq)
        length = self.cache.length(seq)
        if not length:
            return []
        keys, values = (tvm.runtime.empty((2, length, KV_HEADS, HEAD_DIM), "float32") for _ in "kv")
        ask(self.cache, "debug_get_kv", self.cache._ids[seq], 0, length, keys, values)
        found = keys.numpy()
        assert (found == -values.numpy()).all()
        assert (found == found[:1, :, :1, :1]).all()
        return found[0, :, 0, 0].tolist()

    def agrees_with_tvm(self, seq: int) -> None:
        """TVM has one page more than is promised."""
        assert ask(self.cache, "get_num_available_pages") == self.cache.free_pages + 1
        assert ask(self.cache, "get_sequence_length", self.cache._ids[seq]) == self.cache.length(seq)


def test_cache_behaves_as_lists_of_tokens(plain: ModuleType) -> None:
    Machine.module, Machine.out_of_pages = plain, plain.OutOfPages
    Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
    Machine.TestCase("runTest").runTest()


@pytest.mark.parametrize("last", [[-1], [-1, 0, 1], [-1, -1]], ids=["token", "chain", "tree"])
def test_trees_whose_last_is_a_chain(plain: ModuleType, last: list[int]) -> None:
    """TVM alone would keep the first nodes of the first tree, whatever was accepted."""
    machine = Machine()
    machine.module, machine.cache = plain, new_cache(plain, page_size=2)
    for sequence in (0, 1):
        machine.cache.add_sequence(sequence)
    tree = [-1, -1, 1, 1, 3]
    machine.cache.begin_forward([0, 1], [5, len(last)], tree + last)
    machine.write([10, 11, 12, 13, 14, *range(20, 20 + len(last))])
    machine.cache.end_forward()
    machine.cache.commit_tree([1, 0], [0, 4])
    assert machine.read(0) == [11, 13, 14]
    assert machine.read(1) == [20]


def test_frequencies_of_each_new_token(tmp_path: Path) -> None:
    def told(length: int) -> list[float]:
        return [float(length), 0.5]

    cache = new_cache(package(tmp_path, DYNAMIC_ROPE=True), inverse_frequencies=told)
    cache.add_sequence(7)
    cache.add_sequence(-3, prompt_length=6)
    lengths: Callable[[], list[float]] = lambda: cache.inv_freq.numpy()[:, 0].tolist()  # noqa: E731
    cache.begin_forward([7, -3], [3, 2])
    assert lengths() == [3, 3, 3, 6, 6]
    assert cache.inv_freq.dtype == "float32"
    cache.end_forward()
    assert cache.inv_freq is None
    cache.begin_forward([-3, 7], [2, 3], [-1, -1, -1, 0, 0])
    assert lengths() == [6, 6, 4, 5, 5]


@pytest.mark.parametrize("every_layer", [False, True])
def test_what_tvm_computes_wrongly_on_gpus_is_refused(every_layer: bool, tmp_path: Path) -> None:
    module = package(tmp_path, SLIDING=True, EVERY_LAYER_SLIDES=every_layer)
    cache = new_cache(module)
    cache.add_sequence(0)
    for device in ("cpu", "cuda"):
        cache._device = SimpleNamespace(type=device)
        calls = [
            lambda: cache.begin_forward([0], [2], [-1, -1]),
            lambda: cache.begin_forward([0], [5]),
            lambda: cache.fork_sequence(0, 1),
        ]
        for call in calls:
            if device == "cuda":
                with pytest.raises(ValueError, match="does not apply this model's window"):
                    call()
            else:
                call()
                cache.end_forward()
                if cache.sequences.waiting:
                    cache.commit_tree([0], [-1])
    cache.begin_forward([0], [4])
    cache.end_forward()
    assert cache.length(0) == 9


def test_pages_on_gpus_have_one_size(plain: ModuleType) -> None:
    with pytest.raises(ValueError, match="page_size is 4, and TVM's attention for GPUs has pages of 16"):
        new_cache(plain, device=SimpleNamespace(type="cuda"))


def test_nothing_is_left_behind(plain: ModuleType) -> None:
    cache = new_cache(plain)
    for sequence in (0, 1, 2):
        cache.add_sequence(sequence)
    cache.begin_forward([2, 0], [4, 3], [-1, 0, 0, 0, -1, 0, 1])
    cache.end_forward()
    cache.remove_sequence(2)
    cache.add_sequence(2)  # again, while the one before is still part of the batch
    cache.remove_sequence(0)
    cache.remove_sequence(2)
    cache.remove_sequence(1)
    assert ask(cache, "empty")


@pytest.mark.parametrize("failing", ["begin_forward", "get_query_positions"])
def test_a_forward_that_cannot_begin_is_taken_back(
    failing: str, plain: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TVM closes what it opened, of the failed forward's own sequences, and nothing that it did not open."""
    told: list[tuple[object, ...]] = []
    trouble = False

    def call(name: str, state: object, *arguments: Any) -> None:
        told.append((name, *(list(one) if isinstance(one, Shape) else one for one in arguments)))
        if trouble and name.endswith(failing):
            raise MemoryError

    monkeypatch.setattr(plain.cache, "_call", call)
    cache = plain.PagedKVCache(CONFIG, lambda *_: None, 4, 28, 16, 4, "float32", tvm.cpu())
    for sequence in (0, 1):
        cache.add_sequence(sequence)
    cache.begin_forward([0], [2])
    cache.end_forward()
    told.clear()
    trouble = True
    with pytest.raises(MemoryError):
        cache.begin_forward([1], [3], [-1, 0, 0])
    opened = ("kv_state_begin_forward", [1], [3], [-1, 0, 0])
    if failing == "begin_forward":
        assert told == [opened]
    else:
        undone = [("kv_state_end_forward",), ("attention_kv_cache_commit_accepted_token_tree_nodes", [1], [-1])]
        assert told == [opened, ("attention_kv_cache_get_query_positions",), *undone]
    assert (cache.length(0), cache.length(1), cache.free_pages) == (2, 0, 6)
    trouble = False
    cache.begin_forward([0, 1], [1, 1])
