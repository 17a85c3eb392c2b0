"""Rotary frequencies at the sizes of released models, from the rope.py that each backend emits.

Machines of small specs cannot see these: a formula that is right for 16 values a head and 32 tokens may be wrong for
128 and 131,072. Lengths lie on both sides of every threshold.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import qwenspec_triton.emit
import qwenspec_tvm.emit
from qwenspec.backend.package import render
from qwenspec.ir.lower import lower
from qwenspec.ir.rope import follows_length
from qwenspec.spec.document import Spec
from qwenspec.verify.reference_rope import attention_factor, inverse_frequencies
from qwenspec.verify.strategies import spec_of

EXAMPLES = settings().max_examples  # 100 in the `ci` profile
ERROR = 1e-12
TEMPLATES = {"triton": qwenspec_triton.emit.HERE / "templates", "tvm": qwenspec_tvm.emit.HERE / "templates"}

thetas = st.sampled_from([1e4, 5e5, 1e6, 5e6, 1e7]) | st.floats(1e4, 1e7)
factors = st.sampled_from([1.0, 2.0, 4.0, 8.0, 40.0]) | st.floats(1.0, 40.0)
originals = st.sampled_from([2048, 4096, 8192, 32768, 131072]) | st.integers(64, 131072)
own_factors = st.none() | st.floats(0.5, 2.0)

Draw = Callable[..., Any]


def divisors(draw: Draw, pairs: int) -> list[float]:
    return draw(st.lists(st.floats(1.0, 64.0), min_size=pairs, max_size=pairs))


def yarn(draw: Draw, _pairs: int, original: int) -> dict[str, Any]:
    turns = original / (2 * math.pi)  # of the fastest pair: with as many, the ramp ends where it starts
    slow = draw(st.sampled_from([1.0, 0.1]) | st.floats(0.1, 4.0) | st.floats(turns, 1.1 * turns))
    both = draw(st.none() | st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0)))
    return {
        "factor": draw(factors),
        "attention_factor": draw(own_factors),
        "beta_slow": slow,
        "beta_fast": draw(st.just(max(32.0, 2 * slow)) | st.floats(1.5 * slow, 64.0 + 2 * slow)),
        "mscale": both and both[0],
        "mscale_all_dim": both and both[1],
        "truncate": draw(st.booleans()),
    }


def longrope(draw: Draw, pairs: int, _original: int) -> dict[str, Any]:
    lists = {"short_factor": divisors(draw, pairs), "long_factor": divisors(draw, pairs)}
    return {**lists, "factor": draw(st.none() | factors), "attention_factor": draw(own_factors)}


def llama3(draw: Draw, _pairs: int, _original: int) -> dict[str, Any]:
    low = draw(st.sampled_from([1.0, 0.5]) | st.floats(0.25, 8.0))
    return {"factor": draw(factors), "low_freq_factor": low, "high_freq_factor": draw(st.floats(1.1 * low, 64.0))}


def with_factor(draw: Draw, _pairs: int, _original: int) -> dict[str, Any]:
    return {"factor": draw(factors)}


# Each kind's keys but the length that it was trained on.
SCALINGS: dict[str | None, Callable[[Draw, int, int], dict[str, Any]]] = {
    None: lambda _draw, _pairs, _original: {},
    "linear": with_factor,
    "ntk": with_factor,
    "dynamic": with_factor,
    "dynamic_qwen1": lambda _draw, _pairs, _original: {},
    "yarn": yarn,
    "longrope": longrope,
    "llama3": llama3,
}
HAVE_ORIGINAL = ("yarn", "longrope", "llama3")


@st.composite
def real_specs(draw: Draw, kind: str | None) -> Spec:
    """One layer with heads, theta and lengths as large as those of released models."""
    head_dim = draw(st.sampled_from([64, 128, 80, 96, 192, 256]))
    rotary_dim = draw(st.just(head_dim) | st.sampled_from([head_dim // 2, head_dim // 4]))
    original = draw(originals)
    scaling: dict[str, Any] | None = None
    if kind is not None:
        scaling = {"kind": kind, **SCALINGS[kind](draw, rotary_dim // 2, original)}
        if kind in HAVE_ORIGINAL:
            scaling["original_max_position_embeddings"] = original
        elif kind == "dynamic_qwen1":
            scaling["train_length"] = original
    return spec_of(
        {
            "vocab_size": 11,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 8,
            "max_position_embeddings": original * draw(st.sampled_from([1, 2, 4, 32])),
            "norm": {"eps": 1e-6},
            "attention": {"head_dim": head_dim},
            "rope": {
                "theta": draw(thetas),
                "partial_rotary_factor": rotary_dim / head_dim,
                "compute_dtype": draw(st.sampled_from(["activation", "float32"])),
                "scaling": scaling,
            },
        }
    )


def lengths_of(spec: Spec) -> list[int]:
    """Both sides of every length at which frequencies may change, and one short and one long sequence."""
    arch = spec.architecture
    trained = getattr(arch.rope.scaling, "train_length", None)
    original = getattr(arch.rope.scaling, "original_max_position_embeddings", None)
    thresholds = {arch.max_position_embeddings, original or 1}
    thresholds |= {trained << doublings for doublings in range(7)} if trained else set()
    around = {length + step for length, step in itertools.product(thresholds, (-1, 0, 1))}
    return sorted({1, 10**6, *around} - {0})


@contextmanager
def emitted(spec: Spec, templates: Path) -> Iterator[ModuleType]:
    """The package's rope.py, with its config.py beside it, as `rope`."""
    package = ModuleType("_drawn")
    package.__path__ = []
    files = render(lower(spec), templates, ["config", "rope"])
    modules = {"_drawn": package}
    for name in ("config", "rope"):
        modules[f"_drawn.{name}"] = module = ModuleType(f"_drawn.{name}")
        module.__package__ = "_drawn"
    sys.modules |= modules
    try:
        for name in ("config", "rope"):
            exec(compile(files[f"{name}.py"], f"{name}.py", "exec"), vars(modules[f"_drawn.{name}"]))
        yield modules["_drawn.rope"]
    finally:
        for name in modules:
            del sys.modules[name]


@pytest.mark.parametrize("kind", SCALINGS)
def test_emitted_frequencies(kind: str | None) -> None:
    """Of both backends, for every length, to float64's precision."""

    @settings(max_examples=EXAMPLES * 2 if kind == "yarn" else EXAMPLES // 2)  # it has the most options
    @given(real_specs(kind))
    def agrees(spec: Spec) -> None:
        arch, rope = spec.architecture, lower(spec).rope
        event(f"attention factor {'is' if rope.attention_factor == 1 else 'is not'} 1")
        factor = attention_factor(arch.rope.scaling, arch.max_position_embeddings)
        assert rope.attention_factor == pytest.approx(factor, rel=ERROR)
        lengths = lengths_of(spec)
        expected = [
            inverse_frequencies(arch.rope, rope.rotary_dim, arch.max_position_embeddings, length) for length in lengths
        ]
        for backend, templates in TEMPLATES.items():
            with emitted(spec, templates) as module:
                config = module.Config()
                assert getattr(config, "rope_attention_factor", 1.0) == pytest.approx(factor, rel=ERROR)
                for length, frequencies in zip(lengths, expected, strict=True):
                    arguments = (length,) if follows_length(rope.scaling) else ()
                    found = module.inverse_frequencies(config, *arguments)
                    assert found == pytest.approx(frequencies.tolist(), rel=ERROR), f"{backend}, {length} tokens"

    agrees()
