"""TVM packages on several ranks: real processes, whose sums and gathers go through torch.distributed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_calls
from test_tvm_kv_packages import SIZES, WORKLOAD, errors

from hf_parity.oracle import QWEN1, QWEN2, QWEN3, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package
from qwenspec.spec.document import Spec
from qwenspec.verify.contenders import PackageContender, ReferenceContender
from qwenspec.verify.dequantize import Dequantized
from qwenspec.verify.parallel import ParallelRunner
from qwenspec.verify.rank_pool import RankPool
from qwenspec.verify.reference import Reference
from qwenspec.verify.steps import Forward
from qwenspec.verify.weights import save_checkpoint, stored_weights

HERE = Path(__file__).parent
Change = dict[str, Any]

TIED: Change = {"tie_word_embeddings": True}
BIASES: Change = {"attention": {"bias": {"qkv": True, "output": True}}, "mlp": {"bias": True}}
ODD: Change = {"vocab_size": 97, "intermediate_size": 53}  # neither divides
WHOLE: Change = {"hidden_size": 64, "intermediate_size": 96, "attention": {"head_dim": 32}}  # whole groups of 32
DYNAMIC: Change = {"max_position_embeddings": 16, "rope": {"scaling": {"kind": "dynamic", "factor": 2.0}}}
EMBEDDING: Change = {
    "tie_word_embeddings": True,
    "lm_head": None,
    "embedding": {"normalize": True},
    "checkpoint": {"layout": "qwen3_embedding"},
}
ROW_PARALLEL = tuple(f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj"))


def kv_heads(number: int, heads: int = 4) -> Change:
    return {"num_attention_heads": heads, "num_key_value_heads": number}


@dataclass(frozen=True)
class Case:
    degree: int
    changes: tuple[Change, ...]
    beside: Change = field(default_factory=dict)  # the architecture: quantization, kv_cache
    dtype: str = "float32"
    usual: float = 1e-6  # error of a row of logits, relative: the median's bound
    worst: float = 1e-5

    def spec(self) -> Spec:
        return Spec.model_validate(tiny_spec(*self.changes).model_dump(by_alias=True) | self.beside)


def quantized(degree: int, *changes: Change, usual: float = 1e-6, worst: float = 1e-5, **scheme: Any) -> Case:
    return Case(degree, changes, {"quantization": scheme}, usual=usual, worst=worst)


CASES = {
    "1 KV head on 2 ranks, tied": Case(2, (QWEN3, kv_heads(1), TIED, ODD)),
    "1 on 4, all biases": Case(4, (BIASES, kv_heads(1), ODD)),
    "2 on 2, all biases, tied": Case(2, (QWEN3, BIASES, kv_heads(2), TIED)),
    "2 on 4": Case(4, (QWEN3, kv_heads(2), ODD)),
    "4 on 2, fused on disk, frequencies follow the length": Case(2, (QWEN1, DYNAMIC, ODD)),
    "4 on 4, tied": Case(4, (QWEN2, kv_heads(4), TIED, ODD)),
    "3 on 2, each with 2 of 6 query heads": Case(2, (QWEN3, BIASES, kv_heads(3, 6), ODD)),
    "bfloat16": Case(2, (QWEN3, BIASES, TIED, ODD), dtype="bfloat16", usual=2e-2, worst=1e-1),
    "int4, tied, an int8 head": quantized(2, QWEN3, TIED, ODD, scheme="int4"),
    "int8, biases": quantized(2, QWEN2, BIASES, ODD, scheme="int8"),
    "awq, a rank without a group of the MLP": quantized(4, QWEN2, WHOLE, scheme="awq", group_size=32),
    "gptq, groups in any order": quantized(
        2, QWEN2, WHOLE, scheme="gptq", bits=4, group_size=32, sym=False, desc_act=True, skip=ROW_PARALLEL
    ),
    "gptq int8": quantized(2, QWEN3, WHOLE, scheme="gptq", bits=8, group_size=32),
    "fp8": quantized(
        2, QWEN3, WHOLE, scheme="fp8_block", block=(16, 32), activations="dynamic", usual=2e-5, worst=2e-2
    ),
    "fp8 KV cache": Case(2, (QWEN3, TIED), {"kv_cache": {"scheme": "fp8_e4m3"}}, usual=1e-5, worst=1e-2),
}


@pytest.fixture(scope="module", autouse=True)
def _libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENSPEC_CACHE", str(tmp_path_factory.getbasetemp() / "libraries"))
        yield


@pytest.fixture(scope="module")
def ranks(_libraries: None) -> Iterator[Callable[[int], RankPool]]:
    """Processes that serve all tests, so many of them."""
    pools: dict[int, RankPool] = {}

    def pool(size: int) -> RankPool:
        if size not in pools:
            pools[size] = RankPool(size)
        return pools[size]

    yield pool
    for each in pools.values():
        each.close()


@dataclass(frozen=True)
class Files:
    """A spec's package and checkpoint."""

    spec: Spec
    stored: dict[str, np.ndarray]
    package: Path
    weights: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Spec], Files]:
    def written(spec: Spec) -> Files:
        folder, stored = tmp_path_factory.mktemp("model"), stored_weights(spec, 3)
        save_checkpoint(spec, stored, folder / "weights", "float32", shards=2)
        return Files(spec, stored, emit(spec, "tvm", folder), folder / "weights")

    return written


Ranks = Callable[[int], RankPool]
Write = Callable[[Spec], Files]


def opened(pool: RankPool, model: Files, dtype: str = "float32") -> ParallelRunner:
    return ParallelRunner(pool, model.package, model.weights, "cpu", dtype)


# ------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_references(name: str, ranks: Ranks, files: Write) -> None:
    """Chunked prefill, batches, a fork, a rollback, token trees. The pool sees that ranks agree to the last bit."""
    case = CASES[name]
    model = files(case.spec())
    reference = ReferenceContender(model.spec, Dequantized(model.spec, model.stored))
    actual = PackageContender("tvm", opened(ranks(case.degree), model, case.dtype), SIZES)
    found = []
    for step in WORKLOAD:
        expected, logits = reference.do(step), actual.do(step)
        if isinstance(step, Forward):
            assert logits is not None
            assert expected is not None
            assert logits.shape == expected.shape
            found.append(errors(logits, expected))
    assert np.median(np.concatenate(found)) < case.usual
    assert np.concatenate(found).max() < case.worst


def test_an_embedding_model(ranks: Ranks, files: Write) -> None:
    """Every rank has the hidden states: nothing is gathered."""
    model, pool = files(tiny_spec(QWEN3, EMBEDDING, ODD)), ranks(2)
    runner, ids = opened(pool, model), np.arange(11, dtype=np.int32) * 9 % 97
    pool.do(rank_calls.count_collectives)
    out, calls = pool.do(rank_calls.embeddings, runner._runner, ids)
    assert errors(out, Reference(model.spec, model.stored).logits(ids)).max() < 1e-5
    assert calls == ["all_reduce"] * 5


# ----------------------------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("name", ["1 KV head on 2 ranks, tied", "bfloat16"])
def test_two_sums_a_layer_and_one_gather(name: str, ranks: Ranks, files: Write) -> None:
    pool, dtype = ranks(2), CASES[name].dtype
    runner = opened(pool, files(CASES[name].spec()), dtype)
    pool.do(rank_calls.count_collectives)
    cache = runner.create_paged_kv_cache(2, 64, 32)
    for seq in range(2):
        cache.add_sequence(seq)
    pool.do(rank_calls.calls)

    def sent(n: int, rows: int) -> list[tuple[str, str, tuple[int, int]]]:
        """By a forward of n tokens, of which so many have logits."""
        return [("all_reduce", dtype, (n, 48))] * 4 + [("all_gather", "float32", (rows, 49))]

    embeds = runner.embed(np.arange(7, dtype=np.int32))
    assert pool.do(rank_calls.calls) == [("all_reduce", dtype, (7, 48))]
    cache.begin_forward([0, 1], [4, 3])
    runner.batch_prefill(embeds, np.array([3, 6], np.int32), cache)
    cache.end_forward()
    assert pool.do(rank_calls.calls) == sent(7, rows=2)
    cache.begin_forward([1], [1])
    runner.decode(embeds[:, :1], cache)
    cache.end_forward()
    assert pool.do(rank_calls.calls) == sent(1, rows=1)


def test_sums_in_every_dtype(ranks: Ranks, files: Write) -> None:
    """Of numbers that each of them holds."""
    pool = ranks(4)
    runner = opened(pool, files(CASES["2 on 4"].spec()))
    for dtype in ("float32", "float16", "bfloat16"):
        found = pool.do(rank_calls.summed, runner._runner, dtype)
        np.testing.assert_array_equal(found, np.arange(0.5, 4, 0.5) * (1 + 2 + 3 + 4))


def test_sampled_tokens_are_rank_0s(ranks: Ranks, files: Write) -> None:
    """Though every rank draws others."""
    pool = ranks(2)
    runner, prompts = opened(pool, files(CASES["1 KV head on 2 ranks, tied"].spec())), [[5, 3, 8], [7]]
    tokens = {
        (seed, differ): pool.do(rank_calls.generated, runner._runner, prompts, seed, differ)
        for seed, differ in ((0, True), (0, False), (1, False))
    }
    assert len(tokens[0, True]) == 16
    assert tokens[0, True] == tokens[0, False] != tokens[1, False]


# -------------------------------------------------------------------------------------------------------- libraries


def test_one_rank_of_a_machine_compiles(ranks: Ranks, files: Write, tmp_path: Path) -> None:
    model, pool = files(tiny_spec(QWEN3, TIED)), ranks(2)
    assert pool.each(rank_calls.compiles, model.package, model.weights, tmp_path / "cache") == [1, 0]
    assert pool.each(rank_calls.compiles, model.package, model.weights, tmp_path / "cache") == [0, 0]
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.startswith("tiny-float32-llvm-tp2-")

    module = import_package(model.package)
    metadata = rank_calls.part(module, "library").read_metadata(kept)
    assert metadata["tensor_parallel_shards"] == 2
    (first,) = (one for one in metadata["params"] if one["name"] == "first_token")
    assert first == {"name": "first_token", "shape": [1], "dtype": "int32"}
    with pytest.raises(module.BuildError, match=r"is for 2 ranks, and 1 runs the model: start with torchrun .* 2, or"):
        module.Model.load(model.weights, library=kept)
    with pytest.raises(ValueError, match=r"is for 2 ranks, and 4 share the model: .* build another with --tp 4"):
        ranks(4).do(rank_calls.load_library, model.package, model.weights, kept)


def test_a_compiler_that_fails_is_every_ranks_error(files: Write, tmp_path: Path) -> None:
    model = files(tiny_spec(QWEN3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        pool = RankPool(2)
    try:
        with pytest.raises(Exception, match=r"rank 0 on .*: MemoryError: LLVM has no memory") as caught:
            pool.do(rank_calls.compile_in_vain, model.package, model.weights, tmp_path)
        assert type(caught.value).__name__ == "RankError"
    finally:
        pool.close()


def test_build_for_several_ranks(files: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = import_package(files(tiny_spec(QWEN3, ODD)).package)
    build = rank_calls.part(module, "build")
    with pytest.raises(module.BuildError) as caught:
        build.build("cpu", "float32", tmp_path / "model.so", 3)
    reason = "layers.*.attention.qkv_proj: 4 query heads cannot be shared evenly by 3 ranks"
    assert str(caught.value) == f"3 ranks cannot share this model: {reason}; degrees that work: 1, 2, 4"
    assert not (tmp_path / "model.so").exists()
    build.build("cpu", "float32", tmp_path / "model.so", 4)
    assert ", 4 ranks: " in capsys.readouterr().out
    library = rank_calls.part(module, "library").read_library(tmp_path / "model.so")
    shapes = {one["name"]: one["shape"] for one in library.metadata["params"]}
    assert shapes["embed_tokens.weight"] == [25, 48]  # of 97
    assert shapes["layers.1.attention.o_proj.weight"][1] == 16  # of 64 inputs


# --------------------------------------------------------------------------------------------------------- one rank


def test_one_rank_asks_nothing_of_others(files: Write) -> None:
    module = import_package(files(tiny_spec(QWEN3, TIED)).package)
    compiler, targets = (rank_calls.part(module, name) for name in ("compiler", "targets"))
    exported, described = compiler.export("float32", targets.find_target("cpu"))
    assert "ccl" not in exported.script()
    assert "first_token" not in [one["name"] for one in described]
    shared, _ = compiler.export("float32", targets.find_target("cpu"), 2)
    assert shared.script().count("R.ccl.allreduce") == 1 + 4 * 5  # embed, and a forward's in each other method


def test_one_rank_needs_no_torch(files: Write) -> None:
    package = files(tiny_spec(QWEN3)).package
    script = (
        "import sys; sys.modules['torch'] = None\n"
        f"import numpy as np; from {package.name} import engine, parallel\n"
        "ranks = engine.join('cpu', dtype=None)\n"
        "print(ranks.size, engine.together(ranks, lambda: 5), parallel.broadcast(np.array([7]), ranks))"
    )
    told = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", script], cwd=package.parent, env=told, capture_output=True, text=True)
    assert done.stdout == "1 5 [7]\n", done.stderr


# ---------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(("cores", "local", "threads"), [(6, "2", "3"), (7, "2", "3"), (2, "4", "1"), (3, None, "3")])
def test_ranks_of_a_machine_share_its_cores(
    cores: int, local: str | None, threads: str, files: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = importlib.import_module(f"{import_package(files(tiny_spec()).package).__name__}.engine")
    for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "TVM_BIND_THREADS", "TVM_THREAD_POOL_SPIN_COUNT"):
        monkeypatch.setenv(name, "3")
        monkeypatch.delenv(name)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    engine.use_all_cores()
    assert os.environ["TVM_NUM_THREADS"] == threads
