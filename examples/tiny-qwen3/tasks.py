"""Problems with one right answer, written as text: what tiny-qwen3 is trained on and measured by.

Only the standard library, so that a benchmark of any generated package can use it.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

LETTERS = string.ascii_lowercase
DIGITS = string.digits
MOST_PER_TASK = 400  # subtract has the fewest held-out problems, 488


@dataclass(frozen=True)
class Problem:
    """`question` as in "sort 5 3 9 1", `answer` as in "1 3 5 9"."""

    task: str
    question: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether the problem is kept from training, as one in ten is.

        Decided by a hash of the task and the question's words in alphabetical order: a problem and its
        reorderings (27 + 58 and 58 + 27) are on the same side.
        """
        key = f"{self.task}: {' '.join(sorted(self.question.split()))}"
        return hashlib.sha256(key.encode()).digest()[0] % 10 == 0

    def is_correct(self, completion: str) -> bool:
        """Whether a completion is the answer. White space around it does not count, anything more does."""
        return completion.strip() == self.answer


# Held out, and answered correctly by the committed checkpoint.
DEMO = Problem("sort", "sort 5 8 1 3 9 8", "1 3 5 8 8 9")


def plain(question: str) -> str:
    """The plain prompt. The model answers with a leading space and ends with <|endoftext|>."""
    return f"{question} ="


def chat(question: str) -> str:
    """The ChatML prompt, as the chat template renders it. The model ends its answer with <|im_end|>."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


FORMATS: dict[str, Callable[[str], str]] = {"plain": plain, "chat": chat}


def problem(task: str, rng: random.Random) -> Problem:
    """A random problem of a task."""
    question, answer = TASKS[task](rng)
    return Problem(task, question, answer)


def problems(seed: int, *, held_out: bool, tasks: Sequence[str] | None = None) -> Iterator[Problem]:
    """An endless stream of random problems, the tasks in turn, from one side of the split."""
    rng = random.Random(seed)
    while True:
        for task in tasks or TASKS:
            candidate = problem(task, rng)
            while candidate.held_out != held_out:
                candidate = problem(task, rng)
            yield candidate


def held_out_problems(per_task: int, seed: int = 0) -> list[Problem]:
    """`per_task` different held-out problems of every task, the tasks in turn; always the same for a seed.

    Raises ValueError beyond MOST_PER_TASK.
    """
    if per_task > MOST_PER_TASK:
        raise ValueError(f"at most {MOST_PER_TASK} held-out problems of a task, not {per_task}")
    chosen: dict[str, dict[str, Problem]] = {task: {} for task in TASKS}
    for candidate in problems(seed, held_out=True):
        if len(chosen[candidate.task]) < per_task:
            chosen[candidate.task][candidate.question] = candidate
        elif all(len(of_task) == per_task for of_task in chosen.values()):
            break
    return [p for row in zip(*(of_task.values() for of_task in chosen.values()), strict=True) for p in row]


def accuracy(
    generate: Callable[[list[str]], list[str]],
    problems: Sequence[Problem],
    prompt: Callable[[str], str] = chat,
) -> dict[str, float]:
    """The share of right answers, by task. `generate` completes prompts greedily, without special tokens."""
    completions = generate([prompt(p.question) for p in problems])
    right: dict[str, list[bool]] = {}
    for p, completion in zip(problems, completions, strict=True):
        right.setdefault(p.task, []).append(p.is_correct(completion))
    return {task: sum(of_task) / len(of_task) for task, of_task in right.items()}


def _items(rng: random.Random) -> list[str]:
    """Four to eight letters, or as many digits."""
    return rng.choices(rng.choice((LETTERS, DIGITS)), k=rng.randint(4, 8))


def _numbers(rng: random.Random) -> list[int]:
    """Three to five numbers of one or two digits."""
    return [_number(rng) for _ in range(rng.randint(3, 5))]


def _number(rng: random.Random) -> int:
    """A number of one or two digits, either as likely as the other."""
    return rng.choice((rng.randrange(10), rng.randrange(10, 100)))


def _copy(rng: random.Random) -> tuple[str, str]:
    items = _items(rng)
    return f"copy {' '.join(items)}", " ".join(items)


def _reverse(rng: random.Random) -> tuple[str, str]:
    items = _items(rng)
    return f"reverse {' '.join(items)}", " ".join(items[::-1])


def _sort(rng: random.Random) -> tuple[str, str]:
    items = _items(rng)
    return f"sort {' '.join(items)}", " ".join(sorted(items))


def _count(rng: random.Random) -> tuple[str, str]:
    letters = LETTERS[:8]
    wanted = rng.choice(letters)
    items = [wanted if rng.random() < 0.4 else rng.choice(letters) for _ in range(rng.randint(4, 8))]
    return f"count {wanted} in {' '.join(items)}", str(items.count(wanted))


def _max(rng: random.Random) -> tuple[str, str]:
    numbers = _numbers(rng)
    return f"max {' '.join(map(str, numbers))}", str(max(numbers))


def _min(rng: random.Random) -> tuple[str, str]:
    numbers = _numbers(rng)
    return f"min {' '.join(map(str, numbers))}", str(min(numbers))


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = _number(rng), _number(rng)
    return f"{a} + {b}", str(a + b)


def _subtract(rng: random.Random) -> tuple[str, str]:
    b, a = sorted((_number(rng), _number(rng)))
    return f"{a} - {b}", str(a - b)


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "count": _count,
    "max": _max,
    "min": _min,
    "add": _add,
    "subtract": _subtract,
}
