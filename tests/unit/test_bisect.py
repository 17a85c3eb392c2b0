"""Which module is to blame, of outputs made up and of packages with one fault in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import TINY, write_checkpoint
from safetensors.numpy import load_file, save_file

import qwenspec
from qwenspec.backend.api import Runner
from qwenspec.spec.document import Spec
from qwenspec.verify.bisect import GROWTH, ModuleError, first_parting, module_errors
from qwenspec.verify.reference import Reference

PREFIX, NEW = np.arange(9, dtype=np.int32), np.arange(20, 33, dtype=np.int32)
BOUND = {"float32": 1e-4, "bfloat16": 0.15}
LAYER = [
    "input_norm",
    "attention.qkv_proj",
    "attention.q_norm",
    "attention.k_norm",
    "attention.q",
    "attention.k",
    "attention.context",
    "attention.o_proj",
    "attention",
    "post_attention_norm",
    "mlp.gate_up_proj",
    "mlp.down_proj",
    "mlp",
]
ADDRESSES = ["embed_tokens"]
for i in range(2):
    ADDRESSES += [*(f"layers.{i}.{name}" for name in LAYER), f"layers.{i}"]
ADDRESSES += ["norm", "logits"]


# ------------------------------------------------------------------------------------------------ outputs made up


def outputs(**errors: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Actual and expected: ones, off by `rest` everywhere but where an address, with _ for a dot, says otherwise."""
    expected = {address: np.full((3, 4), 4.0) for address in ADDRESSES}
    actual = {}
    for address in ADDRESSES:
        error = errors.get(address.replace(".", "_"), errors.get("rest", 0.0))
        actual[address] = np.array(expected[address], np.float32) * np.float32(1 + error)
    return actual, expected


def test_error_is_the_worst_row_s() -> None:
    expected = {"norm": np.array([[3.0, 4.0], [30.0, 40.0]])}
    actual = {"norm": np.array([[3.0, 4.5], [30.0, 41.0]])}
    assert module_errors(actual, expected) == [ModuleError("norm", 0.1)]


def test_heads_may_be_apart_or_in_one() -> None:
    expected = {"layers.0.attention.q": np.arange(1.0, 25).reshape(2, 3, 4)}
    actual = {"layers.0.attention.q": expected["layers.0.attention.q"].reshape(2, 12)}
    assert module_errors(actual, expected) == [ModuleError("layers.0.attention.q", 0.0)]


def test_a_row_of_zeros_is_judged_by_the_others() -> None:
    expected = {"norm": np.array([[0.0, 0.0], [3.0, 4.0]])}
    close, far = np.array([[1e-6, 0.0], [3.0, 4.0]]), np.array([[1.0, 0.0], [3.0, 4.0]])
    assert module_errors({"norm": close}, expected)[0].error == pytest.approx(1e-6 / (0.01 * 2.5))
    assert module_errors({"norm": far}, expected)[0].error > 10
    assert module_errors({"norm": close}, {"norm": np.zeros((2, 2))})[0].error > 1e30


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_parted(wrong: float) -> None:
    actual, expected = outputs()
    actual["layers.1.attention.context"][1, 2] = wrong
    assert first_parting(actual, expected, 1.0, "float32") == ModuleError("layers.1.attention.context", np.inf)
    assert first_parting(expected, actual, 1.0, "float32") == ModuleError("layers.1.attention.context", np.inf)


def test_nan_travels_and_its_source_is_named() -> None:
    actual, expected = outputs()
    for address in ADDRESSES[ADDRESSES.index("layers.0.mlp.gate_up_proj") :]:
        actual[address][:] = np.nan
    found = first_parting(actual, expected, 1.0, "float32")
    assert found == ModuleError("layers.0.mlp.gate_up_proj", np.inf)


@pytest.mark.parametrize("shape", [(2, 4), (3, 5)])
def test_another_shape_has_parted(shape: tuple[int, int]) -> None:
    actual, expected = outputs()
    actual["norm"] = np.ones(shape)
    assert first_parting(actual, expected, 1.0, "float32") == ModuleError("norm", np.inf)


def test_within_the_bound_nothing_has_parted() -> None:
    assert first_parting(*outputs(rest=9e-4), bound=1e-3, dtype="float32") is None
    assert first_parting(*outputs(layers_1=2e-3), bound=1e-3, dtype="float32") is not None


def test_a_module_is_not_to_blame_for_its_inputs() -> None:
    """Rounding takes a module over the bound; a later one makes things worse by itself."""
    errors = dict.fromkeys(ADDRESSES, 9e-5)
    reached = ADDRESSES.index("layers.0.mlp.down_proj")
    errors |= dict.fromkeys(ADDRESSES[reached:], 2e-4)
    errors |= dict.fromkeys(ADDRESSES[ADDRESSES.index("layers.1.attention.k") :], 5e-2)
    actual, expected = outputs(**{address.replace(".", "_"): error for address, error in errors.items()})
    found = first_parting(actual, expected, 1e-4, "bfloat16")
    assert found is not None
    assert found.address == "layers.1.attention.k"


def test_a_slight_fault_that_a_later_module_made_larger() -> None:
    """Under the bound where it is, over it behind the softmax, which is expected to do that."""
    errors = dict.fromkeys(ADDRESSES, 3e-7)
    after = ADDRESSES.index("layers.0.attention.context")
    errors |= dict.fromkeys(ADDRESSES[after:], 1e-4)
    errors |= dict.fromkeys(["layers.0.attention.k_norm", "layers.0.attention.k"], 1e-5)
    assert GROWTH["attention.context"] > 1e-4 / 1e-5
    actual, expected = outputs(**{address.replace(".", "_"): error for address, error in errors.items()})
    found = first_parting(actual, expected, 5e-5, "float32")
    assert found is not None
    assert found.address == "layers.0.attention.k_norm"


def test_addresses_that_only_one_has_are_left_out() -> None:
    """A variant without QK-norm, say: q is then judged by qkv_proj."""
    actual, expected = outputs(rest=2e-3)
    for taps in (actual, expected):
        del taps["layers.0.attention.q_norm"]
    del actual["layers.0.attention.k_norm"]
    found = [module.address for module in module_errors(actual, expected)]
    assert found == [a for a in ADDRESSES if a not in ("layers.0.attention.q_norm", "layers.0.attention.k_norm")]
    actual["layers.0.attention.q"] *= 1.5
    parted = first_parting(actual, expected, 1e-3, "bfloat16")
    assert parted is not None
    assert parted.address == "layers.0.attention.q"
    with pytest.raises(ValueError, match="no address in common"):
        module_errors({}, expected)


# --------------------------------------------------------------------------------- packages with one fault in them


@dataclass
class Opened:
    """A sound package and what the reference says of the forward that is watched."""

    runner: Any
    expected: Mapping[str, Any]

    def taps(self, between: Callable[[Any], None] = lambda cache: None) -> Mapping[str, Any]:
        """Of NEW after PREFIX, with something done to the cache between the two."""
        cache = self.runner.create_paged_kv_cache(1, 64, 32, page_size=4)
        cache.add_sequence(0)
        cache.begin_forward([0], [len(PREFIX)])
        self.runner.batch_verify(self.runner.embed(PREFIX), cache)
        cache.end_forward()
        between(cache)
        cache.begin_forward([0], [len(NEW)])
        return self.runner.taps(NEW, cache)


def expected_taps(spec: Spec, weights: Mapping[str, Any]) -> Mapping[str, Any]:
    sequence = Reference(spec, weights).sequence()
    sequence.forward(PREFIX)
    sequence.forward(NEW)
    return sequence.taps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Spec, Path]:
    """A spec with QK-norm, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(TINY)
    write_checkpoint(folder / "tiny.yaml", folder / "weights")
    return qwenspec.load(folder / "tiny.yaml"), folder / "weights"


def open_tiny(spec: Spec, weights: Path, folder: Path, backend: str, dtype: str) -> Runner:
    return qwenspec.open_runner(qwenspec.emit(spec, backend, folder), weights, dtype=dtype)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def opened(dtype: str, tiny: tuple[Spec, Path], tmp_path: Path) -> Opened:
    """The Triton package, which a test may break."""
    spec, weights = tiny
    runner = open_tiny(spec, weights, tmp_path, "triton", dtype)
    return Opened(runner, expected_taps(spec, load_file(weights / "model.safetensors")))


def assert_blamed(opened: Opened, dtype: str, address: str, actual: Mapping[str, Any] | None = None) -> None:
    errors = module_errors(actual or opened.taps(), opened.expected)
    found = first_parting(actual or opened.taps(), opened.expected, BOUND[dtype], dtype)
    assert found is not None, errors
    assert found.address == address, errors


def test_a_sound_package_has_no_such_module(opened: Opened, dtype: str) -> None:
    assert list(opened.expected) == ADDRESSES
    assert first_parting(opened.taps(), opened.expected, BOUND[dtype], dtype) is None


WEIGHTS = ["layers.1.input_norm", "layers.0.attention.qkv_proj", "layers.1.attention.q_norm"]
WEIGHTS += ["layers.1.attention.k_norm", "layers.0.attention.o_proj", "layers.1.post_attention_norm"]
WEIGHTS += ["layers.0.mlp.gate_up_proj", "layers.1.mlp.down_proj", "norm"]


@pytest.mark.parametrize("address", WEIGHTS)
def test_a_wrong_weight(address: str, opened: Opened, dtype: str) -> None:
    weight = opened.runner.model.get_parameter(f"{address}.weight").data
    weight *= -0.7
    assert_blamed(opened, dtype, address)


def test_a_wrong_row_of_the_embedding(opened: Opened, dtype: str) -> None:
    opened.runner.model.embed_tokens.weight.data[int(NEW[3])] *= 2
    assert_blamed(opened, dtype, "embed_tokens")


def test_a_wrong_head(opened: Opened, dtype: str) -> None:
    opened.runner.model.lm_head.weight.data[:20] *= 1.5
    assert_blamed(opened, dtype, "logits")


@pytest.mark.parametrize(
    ("function", "argument", "change", "address"),
    [
        ("rotate_and_cache", "sin", lambda sin: -sin, "layers.0.attention.q"),
        ("rotate_and_cache", "eps", lambda eps: eps + 1.0, "layers.0.attention.q_norm"),
        ("rotate_and_cache", "k_norm_weight", lambda w: w.flip(0), "layers.0.attention.k_norm"),
        ("prefill_attention", "scale", lambda scale: 2 * scale, "layers.0.attention.context"),
        ("prefill_attention", "kv_lens", lambda lengths: lengths - 1, "layers.0.attention.context"),
        ("act_and_mul", "gate_up", lambda gate_up: gate_up.flip(-1), "layers.0.mlp.down_proj"),
        ("add_rms_norm", "eps", lambda eps: eps + 1.0, "layers.0.post_attention_norm"),
        ("add_rms_norm", "residual", lambda residual: 0 * residual, "layers.0.post_attention_norm"),
    ],
)
def test_a_kernel_that_is_given_something_else(
    function: str,
    argument: str,
    change: Callable[[Any], Any],
    address: str,
    opened: Opened,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong in every layer: the first is named."""
    layers = opened.runner.module.layers
    right = getattr(layers, function)
    names = right.__code__.co_varnames

    @functools.wraps(right)
    def wrong(*given: Any, **named: Any) -> Any:
        call = dict(zip(names, given, strict=False)) | named
        return right(**call | {argument: change(call[argument])})

    monkeypatch.setattr(layers, function, wrong)
    assert_blamed(opened, dtype, address)


def test_a_stale_page(opened: Opened, dtype: str) -> None:
    """What the cache keeps from before is read by attention alone."""

    def spoil(cache: Any) -> None:
        page = cache.sequences._sequences[0].pages[1]
        cache.pages[1, 1, page] += 4.0

    assert_blamed(opened, dtype, "layers.1.attention.context", opened.taps(spoil))


def test_a_layer_that_adds_wrongly(opened: Opened, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = opened.runner.model.layers[1]
    right = layer.forward

    def wrong(*inputs: Any) -> Any:
        x, residual = right(*inputs)
        return x, 0.5 * residual

    monkeypatch.setattr(layer, "forward", wrong)
    assert_blamed(opened, dtype, "layers.1")


def test_a_wrong_weight_of_a_tvm_package(tiny: tuple[Spec, Path], tmp_path: Path) -> None:
    spec, folder = tiny
    weights = load_file(folder / "model.safetensors")
    (norm,) = [name for name in weights if "layers.1." in name and "k_norm" in name]
    wrong = weights | {norm: weights[norm][::-1].copy()}
    (tmp_path / "wrong").mkdir()
    save_file(wrong, tmp_path / "wrong" / "model.safetensors")
    opened = Opened(open_tiny(spec, tmp_path / "wrong", tmp_path, "tvm", "float32"), expected_taps(spec, wrong))
    actual = opened.taps()
    assert first_parting(actual, opened.expected, BOUND["float32"], "float32") is None
    opened.expected = expected_taps(spec, weights)
    assert_blamed(opened, "float32", "layers.1.attention.k_norm", actual)
