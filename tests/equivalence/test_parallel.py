"""Several ranks compute what one computes: generated packages in processes of their own, as torchrun starts them.

A contender on ranks (`triton@2`) does every step on all of them, and their answers must be one; then it is compared
with the reference and with the same package on one rank. TVM compiles every spec for every number of ranks, so that it
has few examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import strategies as st

from qwenspec.ir.lower import lower
from qwenspec.ir.shard import obstacles
from qwenspec.spec.document import Spec
from qwenspec.verify.case import Case, on_ranks
from qwenspec.verify.search import cases
from qwenspec.verify.steps import Add, CacheSizes, Commit, Fork, Forward, Poison, Popn, Remove, Restart, Step
from qwenspec.verify.strategies import DTYPES, spec_of, specs
from qwenspec.verify.strategies_quantized import KV_CACHES, QUANTIZATIONS

Look = Callable[..., None]
Follow = Callable[[Case, Iterator[Step]], None]
SIZES = CacheSizes(page_size=4, pages=12, max_batch_size=3, chunk=16)


# ------------------------------------------------------------------------------------------- these very models


def model(heads: int, kv_heads: int, *, tied: bool = False, **others: Any) -> dict[str, Any]:
    """With all biases; neither the vocabulary nor the MLP's width divide."""
    return {
        "vocab_size": 51,
        "hidden_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 27,
        "max_position_embeddings": 64,
        "dtype": "float32",
        "tie_word_embeddings": tied,
        "norm": {"eps": 1e-6},
        "attention": {
            "head_dim": 6,
            "bias": {"qkv": True, "output": True},
            "qk_norm": "per_head",
            "sliding_window": {"window": 6, "layers": [1]},
        },
        "mlp": {"bias": True},
        "rope": {"theta": 100.0},
        **others,
    }


def steps(vocabulary: int = 51) -> Iterator[Step]:
    """Every method once, on pages that were full of NaN."""

    def ids(n: int, seed: int) -> tuple[int, ...]:
        return tuple((7 * i + 11 * seed) % vocabulary for i in range(n))

    yield Poison(1)
    yield Add(0, 9)
    yield Forward({0: ids(7, 1)}, "prefill")
    yield Forward({0: ids(4, 2)}, "batch_verify")
    yield Fork(0, 1, 6)
    yield Add(2)
    yield Forward({2: ids(5, 3), 1: ids(3, 4), 0: ids(2, 5)}, "batch_prefill")
    yield Forward({1: ids(1, 6), 0: ids(1, 7), 2: ids(1, 8)}, "batch_decode")
    yield Forward({2: ids(4, 9), 1: ids(2, 10)}, "batch_verify", {2: (-1, 0, 0, 2), 1: (-1, -1)})
    yield Commit({2: 3, 1: 0})
    yield Popn(0, 3)
    yield Remove(2)
    yield Forward({0: ids(1, 11)}, "decode")
    yield Restart(SIZES)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_heads(ranks: int, kv_heads: int, tied: bool, follow: Follow) -> None:
    contenders = ("reference", "triton", on_ranks("triton", ranks))
    follow(Case(spec_of(model(4, kv_heads, tied=tied)), 1, "float32", SIZES, contenders), steps())


@pytest.mark.parametrize(("ranks", "heads", "kv_heads"), [(2, 6, 3), (4, 12, 3), (4, 8, 2)])
def test_neither_divides_the_other(ranks: int, heads: int, kv_heads: int, follow: Follow) -> None:
    """Key/value heads are on several ranks, or more than once on one."""
    contenders = ("reference", "triton", on_ranks("triton", ranks))
    follow(Case(spec_of(model(heads, kv_heads)), 2, "float32", SIZES, contenders), steps())


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "dtype"), [(2, 4, 1, "float32"), (2, 6, 3, "float16"), (4, 4, 2, "bfloat16")]
)
def test_tvm_ranks_and_heads(ranks: int, heads: int, kv_heads: int, dtype: str, follow: Follow) -> None:
    spec = spec_of(model(heads, kv_heads, tied=kv_heads == 3))
    follow(Case(spec, 1, dtype, SIZES, ("reference", on_ranks("tvm", ranks))), steps())


OTHERS: dict[str, dict[str, Any]] = {
    "embedding": {"lm_head": None, "embedding": {"normalize": True}, "checkpoint": {"layout": "qwen3_embedding"}},
    "embedding, not normalised": {"lm_head": None, "embedding": {"normalize": False}},
    "dynamic": {"rope": {"theta": 100.0, "scaling": {"kind": "dynamic", "factor": 3.0}}, "max_position_embeddings": 8},
    "dynamic_qwen1": {
        "rope": {"theta": 100.0, "scaling": {"kind": "dynamic_qwen1", "train_length": 6}},
        "attention": {"head_dim": 6, "bias": {"qkv": True}, "logn": {"train_length": 5}},
        "checkpoint": {"layout": "qwen1"},
    },
    "a head of 16 bits": {"lm_head": {"dtype": "bfloat16"}, "norm": {"eps": 1e-6, "weight": "one_plus"}},
    "fewer tokens than ranks have rows": {"vocab_size": 9, "intermediate_size": 5},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name: str, follow: Follow) -> None:
    contenders = ("reference", "triton", on_ranks("triton", 4))
    spec = spec_of({**model(4, 2, tied="head" in name), **OTHERS[name]})
    follow(Case(spec, 3, "float32", SIZES, contenders), steps(spec.architecture.vocab_size))


# Heads are 16 wide; the MLP has 7 groups of 8 features, or 3 of 16 and a half, of which one rank has fewer.
SCHEMES: dict[str, dict[str, Any]] = {
    "fp8_block": {"scheme": "fp8_block", "block": [16, 8]},
    "fp8_block, weights alone": {"scheme": "fp8_block", "block": [8, 16], "activations": "none"},
    "awq": {"scheme": "awq", "group_size": 8},
    "gptq": {"scheme": "gptq", "bits": 4, "group_size": 16, "sym": False},
    "gptq, 8 bits, in one group": {"scheme": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
    "gptq, ordered": {"scheme": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
    "int8": {"scheme": "int8", "head": "int8"},
    "int4": {"scheme": "int4", "group_size": 16, "head": "int4"},
    "int4, head of 8 bits": {"scheme": "int4", "group_size": 8, "head": "int8"},
}


def quantized_spec(name: str) -> Spec:
    """With key/value caches of all kinds, one after the other."""
    kinds = (None, *KV_CACHES.values())
    number = list(SCHEMES).index(name)
    architecture = model(4, 2, tied=number % 2 == 1, hidden_size=32, intermediate_size=56)
    architecture["attention"] = architecture["attention"] | {"head_dim": 16}
    skip: list[str] = []
    if "ordered" in name:  # ranks cannot share inputs that have an order of their own
        skip = [f"model.layers.{i}.{module}" for i in range(2) for module in ("self_attn.o_proj", "mlp.down_proj")]
    return spec_of(architecture, SCHEMES[name] | {"skip": skip}, kinds[number % len(kinds)])


@pytest.mark.parametrize("name", SCHEMES)
def test_formats(name: str, follow: Follow) -> None:
    contenders = ("reference", "triton", on_ranks("triton", 2))
    follow(Case(quantized_spec(name), 4, "float32", SIZES, contenders), steps())


@pytest.mark.parametrize("name", ["fp8_block", "awq", "int4"])
def test_tvm_formats(name: str, follow: Follow) -> None:
    follow(Case(quantized_spec(name), 4, "float32", SIZES, ("reference", on_ranks("tvm", 2))), steps())


# ------------------------------------------------------------------------------------------------- drawn specs


def shared(ranks: int, **options: Any) -> st.SearchStrategy[Spec]:
    """Specs whose blocks of rows allow so many ranks too."""
    return specs(max_layers=2, ranks=ranks, **options).filter(lambda spec: not obstacles(lower(spec), ranks))


def sizes() -> st.SearchStrategy[CacheSizes]:
    """Small ones: ranks need a while to fill them with NaN."""
    return st.builds(CacheSizes, st.integers(3, 9), st.integers(4, 12), st.integers(2, 4), st.integers(4, 24))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton(dtype: str, ranks: int, look: Look) -> None:
    drawn = shared(ranks, dtypes=[dtype], kv_caches=(None, None, *KV_CACHES))
    contenders = ("triton", on_ranks("triton", ranks))
    look(cases(drawn, sizes(), contenders, (dtype,), False), sizes(), examples=6, steps=8, seed=41, max_length=40)


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_triton_quantized(scheme: str, look: Look) -> None:
    drawn = shared(2, quantizations=[scheme], kv_caches=(None, *KV_CACHES))
    contenders = ("triton", on_ranks("triton", 2))
    look(cases(drawn, sizes(), contenders, DTYPES, False), sizes(), examples=5, steps=6, seed=42, max_length=40)


def test_tvm(look: Look) -> None:
    contenders = ("tvm", on_ranks("tvm", 2))
    look(cases(shared(2), sizes(), contenders, DTYPES, False), sizes(), examples=2, steps=12, seed=43, max_length=40)
