"""tiny-qwen3's problems: the split, the checker, the formats."""

from __future__ import annotations

import itertools
import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny-qwen3"))
import tasks


def first(n: int, *, seed: int, held_out: bool) -> list[tasks.Problem]:
    return list(itertools.islice(tasks.problems(seed, held_out=held_out), n))


def test_problems_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    assert first(80, seed=7, held_out=False) == first(80, seed=7, held_out=False)
    assert first(80, seed=7, held_out=False) != first(80, seed=8, held_out=False)


def test_training_and_held_out_problems_share_nothing_even_reordered() -> None:
    def keys(problems: list[tasks.Problem]) -> set[tuple[str, ...]]:
        return {(p.task, *sorted(p.question.split())) for p in problems}

    train, held_out = first(8000, seed=0, held_out=False), first(2000, seed=1, held_out=True)
    assert not keys(train) & keys(held_out)
    assert {p.task for p in train} == {p.task for p in held_out} == set(tasks.TASKS)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_about_one_problem_in_ten_is_held_out(task: str) -> None:
    rng = random.Random(0)
    share = sum(tasks.problem(task, rng).held_out for _ in range(3000)) / 3000
    assert 0.06 < share < 0.14


def test_the_split_does_not_change() -> None:
    """The committed checkpoint was trained on one side of it: these may never move."""
    assert tasks.DEMO.held_out
    assert tasks.Problem("add", "38 + 79", "117").held_out
    assert tasks.Problem("add", "79 + 38", "117").held_out
    assert not tasks.Problem("add", "27 + 58", "85").held_out
    assert not tasks.Problem("sort", "sort 5 3 9 1", "1 3 5 9").held_out


def test_held_out_problems_are_distinct_and_as_many_for_each_task() -> None:
    problems = tasks.held_out_problems(50)
    assert len({p.question for p in problems}) == len(problems) == 50 * len(tasks.TASKS)
    assert all(p.held_out for p in problems)
    assert [p.task for p in problems[: len(tasks.TASKS)]] == list(tasks.TASKS)
    assert problems == tasks.held_out_problems(50)


def test_more_held_out_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="at most 400"):
        tasks.held_out_problems(401)


def independent_answer(question: str) -> str:
    """Worked out from the text of the question alone, not as the generator does."""
    if sums := re.fullmatch(r"(\d+) ([+-]) (\d+)", question):
        a, sign, b = sums.groups()
        return str(int(a) + int(f"{sign}{b}"))
    word, *items = question.split()
    if word == "count":
        wanted, separator, *rest = items
        assert separator == "in"
        return str(len([item for item in rest if item == wanted]))
    if word in ("max", "min"):
        return sorted(items, key=int)[-1 if word == "max" else 0]
    assert 4 <= len(items) <= 8
    if word == "sort":
        while any(a > b for a, b in itertools.pairwise(items)):
            for i in range(len(items) - 1):
                items[i : i + 2] = min(items[i : i + 2]), max(items[i : i + 2])
        return " ".join(items)
    if word == "reverse":
        return f"{question} "[:-1].removeprefix("reverse ")[::-1]
    assert word == "copy"
    return question.removeprefix("copy ")


def test_answers_are_right() -> None:
    for p in [tasks.DEMO, *first(1600, seed=3, held_out=False)]:
        assert p.answer == independent_answer(p.question), p
        assert not p.answer.startswith("-")


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        ("1 3 5 9", True),
        (" 1 3 5 9\n", True),
        ("1 3 5 9 9", False),
        ("1 3 5", False),
        ("1 3 9 5", False),
        ("1359", False),
        ("1 3 5 9<|im_end|>", False),
        ("", False),
    ],
)
def test_a_completion_is_checked_exactly(completion: str, correct: bool) -> None:
    assert tasks.Problem("sort", "sort 5 3 9 1", "1 3 5 9").is_correct(completion) is correct


def test_accuracy_is_the_share_of_right_answers_by_task() -> None:
    problems = tasks.held_out_problems(4)
    seen: list[str] = []

    def generate(prompts: list[str]) -> list[str]:
        """Right but for all of copy's and one of add's."""
        seen.extend(prompts)
        answers = [p.answer if p.task != "copy" else "?" for p in problems]
        answers[[p.task for p in problems].index("add")] = "?"
        return answers

    shares = tasks.accuracy(generate, problems, tasks.plain)
    assert shares == dict.fromkeys(tasks.TASKS, 1.0) | {"copy": 0.0, "add": 0.75}
    assert seen == [f"{p.question} =" for p in problems]
