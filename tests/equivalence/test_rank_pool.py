"""What several ranks are asked through: one answer of all, or a failure that says who differs, in bounded time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qwenspec.diagnostics import Diagnostic, ExitCode, SpecError
from qwenspec.verify import rank_pool
from qwenspec.verify.rank_pool import RankFailure, RankPool

RANK = "int(__import__('os').environ['RANK'])"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture
def own_pool() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def test_ranks_are_told_what_torchrun_tells(pool: RankPool) -> None:
    assert pool.each(eval, RANK) == [0, 1]
    told = [pool.do(eval, f"__import__('os').environ['{name}']") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    assert told == ["2", "2"]


def test_an_answer_is_that_of_every_rank(pool: RankPool) -> None:
    array = np.array([1.0, np.nan], np.float32)
    assert np.array_equal(pool.do(np.add, array, array), array + array, equal_nan=True)
    with pytest.raises(RankFailure, match=r"ranks 0 and 1 differ: 0, and 1$"):
        pool.do(eval, RANK)


@pytest.mark.parametrize("made", ["float('nan')", "1.0", "2.0"])
def test_one_number_is_enough_to_differ(made: str, pool: RankPool) -> None:
    assert pool.do(len, [0]) == 1
    with pytest.raises(RankFailure, match="differ"):
        pool.do(eval, f"__import__('numpy').array([0.0, {made} if {RANK} else 3.0])")


def test_what_all_raise_is_raised(pool: RankPool) -> None:
    with pytest.raises(ValueError, match=r"^invalid literal for int\(\) with base 10: 'x'$") as raised:
        pool.do(int, "x")
    assert type(raised.value) is ValueError
    assert pool.do(int, "7") == 7


def test_classes_of_packages_keep_their_names(pool: RankPool) -> None:
    class_of_ranks = "type('OutOfPages', (RuntimeError,), {'__module__': '_qwenspec_package'})"
    with pytest.raises(RuntimeError, match=r"^no page is free$") as raised:
        pool.do(eval, f"(_ for _ in ()).throw({class_of_ranks}('no page is free'))")
    assert type(raised.value).__name__ == "OutOfPages"


def test_diagnostics_come_back_whole(pool: RankPool) -> None:
    told = Diagnostic("checkpoint", "missing: a tensor", hint="is it the checkpoint of this variant?")
    with pytest.raises(SpecError) as raised:
        pool.do(eval, "(_ for _ in ()).throw(error)", {"error": SpecError((told,), ExitCode.BACKEND_MISSING)})
    assert (raised.value.diagnostics, raised.value.exit_code) == ((told,), ExitCode.BACKEND_MISSING)


def test_an_error_of_one_rank_is_a_failure_of_its_own(pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"differ: ZeroDivisionError: division by zero, and 1\.0$"):
        pool.do(eval, f"1 / {RANK}")
    assert pool.do(len, "both") == 4


def test_what_is_kept_goes_with_its_handle(pool: RankPool) -> None:
    handle = pool.make(tempfile.TemporaryDirectory)
    folders = [Path(name) for name in pool.each(getattr, handle, "name")]
    assert len(set(folders)) == 2
    assert all(folder.is_dir() for folder in folders)
    del handle
    pool.do(len, [])
    assert not any(folder.exists() for folder in folders)


def test_a_rank_that_ends_is_named(own_pool: RankPool) -> None:
    own_pool.do(len, [])
    with pytest.raises(RankFailure, match=r"rank 1 of 2 has ended with 3\nrank 1 printed: last words"):
        own_pool.do(eval, f"(print('last words', flush=True), __import__('os')._exit(3)) if {RANK} else 0")
    with pytest.raises(RankFailure, match="rank 1 of 2 has ended with 3"):  # still the reason
        own_pool.do(len, [])
    own_pool.close()


def test_a_rank_that_does_not_answer_is_not_waited_for(own_pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for what it is about to say."""
    processes = own_pool.each(os.getpid)
    monkeypatch.setattr(rank_pool, "GRACE", 0.3)
    monkeypatch.setattr(rank_pool, "FAREWELL", 0.3)
    with pytest.raises(RankFailure, match=r"rank 1 of 2 does not answer; rank 0 says 0\nrank 1 printed: nothing"):
        own_pool.do(eval, f"__import__('time').sleep(10**6) if {RANK} else 0")
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_ranks_that_do_not_start_are_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Dead(rank_pool._Rank):
        def __init__(self, *given: int) -> None:
            super().__init__(*given)
            started.append(self)
            self.process.kill()

    monkeypatch.setattr(rank_pool, "_Rank", Dead)
    monkeypatch.setattr(rank_pool, "FAREWELL", 0.3)
    try:
        for _ in range(3):
            with pytest.raises(SpecError, match=r"^3 ranks cannot be used: rank \d of 3 has ended with -9") as raised:
                rank_pool.pool(3)
            assert "\n" not in str(raised.value)
        assert len(started) == 3
    finally:
        rank_pool._given_up().clear()


def test_nor_are_those_that_end_while_a_package_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = rank_pool.pool(1)
    with pytest.raises(RankFailure):
        ranks.do(os._exit, 6)
    try:
        for act in (lambda: rank_pool.give_up(ranks), lambda: rank_pool.pool(1)):
            with pytest.raises(SpecError, match=r"^1 ranks cannot be used: rank 0 of 1 has ended with 6"):
                act()
    finally:
        rank_pool._given_up().clear()


def test_ranks_that_are_gone_are_started_anew() -> None:
    first = rank_pool.pool(1)
    assert rank_pool.pool(1) is first
    with pytest.raises(RankFailure, match="has ended with 5"):
        first.do(os._exit, 5)
    assert rank_pool.pool(1).do(len, "new") == 3
