"""Wrong calls of a package's model and cache: on both backends the same exception in the same words, and then the cache
is as it was."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_parity.oracle import QWEN3, Oracle, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.registry import open_runner
from qwenspec.backend.runtime.generation import NonFiniteError, check_chosen
from qwenspec.diagnostics import SpecError

VOCAB, HIDDEN, PROMPT, NEXT = 300, 48, [5, 6, 7], 9
BACKENDS = ("triton", "tvm")

Call = Callable[[Any, Any], object]  # of a runner, and a cache with sequence 0 of three tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrong-calls")


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(tiny_spec(QWEN3, {"vocab_size": VOCAB}))


@pytest.fixture(scope="module")
def runners(oracle: Oracle, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    weights = oracle.save(folder)
    with pytest.MonkeyPatch.context() as patch:
        # Where test_tvm_generate.py keeps the same package's library.
        patch.setenv("QWENSPEC_CACHE", str(tmp_path_factory.getbasetemp() / "libraries"))
        yield {name: open_runner(emit(oracle.spec, name, folder / name), weights) for name in BACKENDS}


def begun(runner: Any) -> Any:
    cache = runner.create_paged_kv_cache(4, 64, 32, 4)
    cache.add_sequence(0)
    cache.begin_forward([0], [len(PROMPT)])
    runner.prefill(runner.embed(PROMPT), cache)
    cache.end_forward()
    return cache


def embeds(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def opened(call: Call, ids: list[int] | None = None, lengths: list[int] | None = None, parents: Any = None) -> Call:
    """The call in a forward of three new tokens."""

    def run(runner: Any, cache: Any) -> object:
        for sequence in (ids or [0])[1:]:
            cache.add_sequence(sequence)
        cache.begin_forward(ids or [0], lengths or [3], parents)
        return call(runner, cache)

    return run


def positions(*numbers: Any) -> Call:
    return opened(lambda r, c: r.batch_prefill(r.embed(PROMPT), list(numbers), c))


def made(batch: Any = 4, tokens: Any = 64, chunk: Any = 32, page: Any = 4) -> Call:
    return lambda r, c: r.create_paged_kv_cache(batch, tokens, chunk, page)


def generated(prompts: Any, **options: Any) -> Call:
    return lambda r, c: list(r.module.generate(r.model, prompts, r.module.Sampling(max_tokens=2), **options))


WRONG: dict[str, tuple[Call, str]] = {
    # ----------------------------------------------------------------------------------------------------- ids
    "id below 0": (lambda r, c: r.embed([5, -1]), "ids: -1 is not in 0 … 299"),
    "id past the end": (lambda r, c: r.embed([300]), "ids: 300 is not in 0 … 299"),
    "id of 33 bits": (lambda r, c: r.embed([2**32 + 1]), "ids: 4294967297 is not in 0 … 299"),
    "id of 65 bits": (lambda r, c: r.embed([2**70]), "ids are numbers, and not object"),
    "id with a fraction": (
        lambda r, c: r.embed([1.5]),
        "ids are int32 or int64 [n], at least one, and not float64 [1]",
    ),
    "id that is a bool": (lambda r, c: r.embed([True]), "ids are int32 or int64 [n], at least one, and not bool [1]"),
    "id that is text": (lambda r, c: r.embed(["5"]), "ids are numbers, and not <U1"),
    "no id": (
        lambda r, c: r.embed(np.zeros(0, np.int32)),
        "ids are int32 or int64 [n], at least one, and not int32 [0]",
    ),
    "two rows of ids": (
        lambda r, c: r.embed([[1], [2]]),
        "ids are int32 or int64 [n], at least one, and not int64 [2, 1]",
    ),
    "unsigned ids": (
        lambda r, c: r.embed(np.ones(1, np.uint32)),
        "ids are int32 or int64 [n], at least one, and not uint32",
    ),
    # ----------------------------------------------------------------------------------------- logit positions
    "negative position": (positions(-1), "logit_positions: -1 is not in 0 … 2"),
    "position past the end": (positions(0, 3), "logit_positions: 3 is not in 0 … 2"),
    "position with a fraction": (positions(0.5), "logit_positions are int32 or int64 [n]"),
    "no position": (positions(), "logit_positions are int32 or int64 [n], at least one, and not float64 [0]"),
    # -------------------------------------------------------------------------------------------------- embeds
    "embeds too narrow": (opened(lambda r, c: r.prefill(embeds(1, 3, 47), c)), "embeds are [1, 3, 47], and this"),
    "embeds of rank 2": (opened(lambda r, c: r.prefill(embeds(3, HIDDEN), c)), "takes [1, n, 48]"),
    "two rows to prefill": (opened(lambda r, c: r.prefill(embeds(2, 3, HIDDEN), c)), "takes [1, n, 48]"),
    "no token to verify": (opened(lambda r, c: r.batch_verify(embeds(1, 0, HIDDEN), c)), "takes [1, n, 48]"),
    "two tokens to decode": (opened(lambda r, c: r.decode(embeds(1, 2, HIDDEN), c)), "takes [1, 1, 48]"),
    "two columns to decode": (opened(lambda r, c: r.batch_decode(embeds(1, 2, HIDDEN), c)), "takes [b, 1, 48]"),
    "embeds that are text": (opened(lambda r, c: r.prefill(["a"], c)), "embeds are numbers, and not <U1"),
    "more tokens than begun": (
        opened(lambda r, c: r.prefill(embeds(1, 4, HIDDEN), c)),
        "4 tokens are given, and begin_forward made room for 3",
    ),
    "prefill of two sequences": (
        opened(lambda r, c: r.prefill(r.embed(PROMPT), c), [0, 1], [1, 2]),
        "the open forward has 2 sequences, and this method takes 1: batch_prefill takes any",
    ),
    "decode of a sequence's three tokens": (
        opened(lambda r, c: r.batch_decode(embeds(3, 1, HIDDEN), c)),
        "the open forward has 1 sequences, and this method takes 3: batch_prefill takes any",
    ),
    "no cache": (lambda r, c: r.prefill(r.embed([5]), None), "the cache is a NoneType, and not one of this model's"),
    # ------------------------------------------------------------------------------------------------ forwards
    "nothing is open": (lambda r, c: r.prefill(r.embed([5]), c), "no forward is open: call begin_forward"),
    "begun twice": (
        opened(lambda r, c: c.begin_forward([0], [1])),
        "a forward is open already: call end_forward when its logits are there, or cancel_forward if it failed",
    ),
    "another begun": (opened(lambda r, c: (c.add_sequence(1), c.begin_forward([1], [1]))), "a forward is open already"),
    "removed while open": (opened(lambda r, c: c.remove_sequence(0)), "sequence 0 is part of the open forward"),
    "removed while a tree is open": (
        opened(lambda r, c: c.remove_sequence(0), parents=[-1, 0, 0]),
        "sequence 0 is part of the open forward",
    ),
    "popped while open": (opened(lambda r, c: c.popn(0, 1)), "sequence 0 is part of the open forward"),
    "forked while open": (opened(lambda r, c: c.fork_sequence(0, 1)), "sequence 0 is part of the open forward"),
    "length with a fraction": (lambda r, c: c.begin_forward([0], [1.5]), "new tokens is 1.5, and should be an integer"),
    "length that is a bool": (
        lambda r, c: c.begin_forward([0], [True]),
        "new tokens is True, and should be an integer",
    ),
    "no new token": (lambda r, c: c.begin_forward([0], [0]), "a sequence of a forward needs a new token"),
    "more than a forward takes": (lambda r, c: c.begin_forward([0], [33]), "33 tokens in one forward, at most 32"),
    "more than the cache holds": (
        lambda r, c: [c.add_sequence(1), c.begin_forward([0], [32]), c.end_forward(), c.begin_forward([1], [32])],
        "8 more of 16 pages of 4 tokens needed, 7 free",
    ),
    "a sequence twice": (lambda r, c: c.begin_forward([0, 0], [1, 1]), "a sequence appears twice in [0, 0]"),
    "a sequence that is not there": (lambda r, c: c.begin_forward([4], [1]), "the cache has no sequence 4; it has [0]"),
    "lengths missing": (lambda r, c: c.begin_forward([0], []), "1 sequences with 0 lengths"),
    "parent with a fraction": (lambda r, c: c.begin_forward([0], [1], [-1.0]), "a parent in tree_parents is -1.0"),
    # ----------------------------------------------------------------------------------------------- sequences
    "sequence that is text": (lambda r, c: c.add_sequence("a"), "a sequence's id is 'a', and should be an integer"),
    "sequence that is None": (lambda r, c: c.add_sequence(None), "a sequence's id is None, and should be an integer"),
    "sequence added twice": (lambda r, c: c.add_sequence(0), "sequence 0 exists already"),
    "prompt of no length": (
        lambda r, c: c.add_sequence(1, 0),
        "prompt_length is 0, and should be an integer of at least 1",
    ),
    "popped half a token": (
        lambda r, c: c.popn(0, 0.5),
        "the number of tokens to remove is 0.5, and should be an integer",
    ),
    "popped too far": (lambda r, c: c.popn(0, 4), "cannot remove 4 tokens of sequence 0: it has 3"),
    "forked at half a token": (lambda r, c: c.fork_sequence(0, 1, 0.5), "tokens to fork at is 0.5, and should be an"),
    "forked too far": (lambda r, c: c.fork_sequence(0, 1, 4), "cannot fork sequence 0 at 4: it has 3 tokens"),
    "removed before it was there": (lambda r, c: c.remove_sequence(7), "the cache has no sequence 7; it has [0]"),
    "committed without a tree": (lambda r, c: c.commit_tree([0], [0]), "no token tree is to be committed"),
    # --------------------------------------------------------------------------------------------------- sizes
    "pages of no token": (made(page=0), "page_size is 0, and should be an integer of at least 1"),
    "pages below 0": (made(page=-16), "page_size is -16, and should be an integer of at least 1"),
    "no sequence at all": (made(batch=0), "max_batch_size is 0, and should be an integer of at least 1"),
    "sequences below 0": (made(batch=-1), "max_batch_size is -1, and should be an integer of at least 1"),
    "no room": (made(tokens=0), "max_total_seq_len is 0, and should be an integer of at least 1"),
    "room with a fraction": (made(tokens=10.5), "max_total_seq_len is 10.5, and should be an integer"),
    "room as text": (made(tokens="64"), "max_total_seq_len is '64', and should be an integer"),
    "chunks of no token": (made(chunk=0), "prefill_chunk_size is 0, and should be an integer of at least 1"),
    # ---------------------------------------------------------------------------------------------- generation
    "no prompt": (generated([]), "every prompt needs a token"),
    "empty prompt": (generated([[5], []]), "every prompt needs a token"),
    "prompt past the vocabulary": (generated([[300]]), "token id 300 is outside the vocabulary of 300"),
    "prompt below 0": (generated([[5], [-1]]), "token id -1 is outside the vocabulary of 300"),
    "prompt with a fraction": (generated([[5], [1.7]]), "a token of prompt 1 is 1.7, and should be an integer"),
    "prompt with a bool": (generated([[True]]), "a token of prompt 0 is True, and should be an integer"),
    "prompt as text": (generated(["ab"]), "a token of prompt 0 is 'a', and should be an integer"),
    "generated in pages of no token": (generated([[5]], page_size=0), "page_size is 0, and should be"),
    "generated in chunks of no token": (
        generated([[5]], prefill_chunk_size=0),
        "prefill_chunk_size is 0, and should be",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_told_alike_and_changes_nothing(name: str, runners: dict[str, Any], oracle: Oracle) -> None:
    call, message = WRONG[name]
    told = {}
    for backend, runner in runners.items():
        cache = begun(runner)
        with pytest.raises((ValueError, KeyError, RuntimeError, TypeError), match=re.escape(message)) as caught:
            call(runner, cache)
        told[backend] = type(caught.value).__name__, str(caught.value)
        cache.cancel_forward()
        length = cache.length(0)
        cache.popn(0, length - len(PROMPT))  # of a call that was right until its last step
        cache.begin_forward([0], [1])
        logits = runner.decode(runner.embed([NEXT]).reshape(1, 1, -1), cache)
        cache.end_forward()
        np.testing.assert_allclose(logits[0, 0], oracle.logits([*PROMPT, NEXT])[-1], rtol=0, atol=1e-4)
    assert told["triton"] == told["tvm"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parents", [None, [-1, 0, 1], [-1, 0, 0]], ids=["plain", "chain", "tree"])
@pytest.mark.parametrize("ran", [False, True], ids=["before", "after"])
def test_a_forward_that_failed_is_cancelled_and_tried_again(
    backend: str, parents: Any, ran: bool, runners: dict[str, Any], oracle: Oracle
) -> None:
    """Without a trace, though what it computed is in the pages."""
    runner = runners[backend]
    cache = begun(runner)
    free = cache.free_pages
    cache.add_sequence(1)
    cache.begin_forward([1, 0], [2, 3], None if parents is None else [-1, 0, *parents])
    if ran:
        runner.batch_verify(runner.embed([8] * 5), cache)
    cache.cancel_forward()
    assert (cache.length(0), cache.length(1), cache.free_pages) == (len(PROMPT), 0, free)
    cache.begin_forward([0, 1], [1, 1])
    logits = runner.batch_decode(runner.embed([NEXT, PROMPT[0]]).reshape(2, 1, -1), cache)
    cache.end_forward()
    for found, ids in zip(logits[:, 0], ([*PROMPT, NEXT], PROMPT[:1]), strict=True):
        np.testing.assert_allclose(found, oracle.logits(ids)[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None])
def test_both_backends_see_what_is_not_finite(dtype: str, bad: float | None, runners: dict[str, Any]) -> None:
    """Anywhere in a tensor, and not in one whose sum overflows."""
    import ml_dtypes
    import torch

    largest = float(torch.finfo(getattr(torch, dtype)).max)
    for place in (0, 77, 198):
        values = np.full(199, largest)
        if bad is not None:
            values[place] = bad
        own = {
            "triton": torch.tensor(values, dtype=torch.float64).to(getattr(torch, dtype)).reshape(199, 1),
            "tvm": values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).reshape(199, 1),
        }
        for backend, runner in runners.items():
            assert part(runner, "weights").finite(own[backend]) == (bad is None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_not_finite_are_refused_by_name(
    backend: str, runners: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        runners[backend].module.CheckpointError, match=r"^model.layers.1.mlp.up_proj.weight holds numbers that are NaN"
    ):
        runners[backend].module.Model.load(tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_token_is_chosen_by_logits_that_are_not_finite(
    backend: str, temperature: float, bad: float, runners: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two prompts one goes wrong at its third token: two are told of each, then which prompt it was."""
    runner = runners[backend]
    module, model = runner.module, runner.model
    decode, calls = model.batch_decode, []

    def decoded(*arguments: Any) -> Any:
        calls.append(1)
        logits = runner._numpy(decode(*arguments))
        if len(calls) == 2:
            logits[1, 0, 7] = bad
        return runner._embeds(logits) if backend == "triton" else model._tensor(logits)

    monkeypatch.setattr(model, "batch_decode", decoded)
    sampling = module.Sampling(temperature=temperature, top_k=5, top_p=0.9, max_tokens=9)
    told = []
    with pytest.raises(module.NonFiniteError, match=r"^the logits of prompt 1 are NaN or infinite") as caught:
        told.extend(token.prompt for token in module.generate(model, [PROMPT, [8]], sampling))
    assert told == [0, 1, 0, 1]
    assert "float32" in str(caught.value)


def test_what_not_finite_logits_may_mean() -> None:
    with pytest.raises(NonFiniteError, match="exceed float16's range of 65504; take dtype bfloat16 or float32"):
        check_chosen([4, -1, -1], [0, 2, 5], "float16")
    with pytest.raises(NonFiniteError, match=r"prompt 2, 5 are NaN.* in bfloat16, weights or scales that are damaged"):
        check_chosen([4, -1, -1], [0, 2, 5], "bfloat16")
    check_chosen([4, 0], [0, 1], "float16")


def part(runner: Any, name: str) -> Any:
    return importlib.import_module(f"{runner.module.__name__}.{name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cuda:99", None, "'cuda:99': no such GPU is visible here: use device 'cpu'"),
        ("foo", None, "'foo' is no "),
        ("cpu", "fp8", "dtype 'fp8' is not one of float32, float16, bfloat16"),
    ],
)
def test_devices_and_dtypes_that_are_not(
    backend: str, device: str, dtype: str | None, message: str, runners: dict[str, Any], folder: Path
) -> None:
    """A SpecError, as docs/cli.md says."""
    package = next((folder / backend).iterdir())
    with pytest.raises(SpecError, match=f"^{re.escape(message)}"):
        open_runner(package, folder, device, dtype)
