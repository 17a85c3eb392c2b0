"""The bookkeeping of a paged KV cache, by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwenspec.backend.runtime.checks import check_embeds, check_integers
from qwenspec.backend.runtime.generation import NonFiniteError, check_chosen, check_prompts
from qwenspec.backend.runtime.sequences import MAX_TREE_SIZE, OutOfPages, Sequences, Tree


def made(pages: int = 6, **options: int) -> Sequences:
    """Room for 4 sequences in pages of 4 tokens, and sequence 0 with 6."""
    sequences = Sequences(4, 4 * pages, 16, 4, **options)
    sequences.add(0)
    forward(sequences, {0: 6})
    return sequences


def forward(sequences: Sequences, lengths: dict[int, int], parents: list[int] | None = None) -> None:
    sequences.begin_forward(list(lengths), list(lengths.values()), parents)
    sequences.end_forward()


def test_only_full_pages_are_shared() -> None:
    sequences = made()
    assert sequences.fork(0, 1, 4) is None
    assert sequences.free_pages == 4
    assert sequences.fork(0, 2, 5) == (1, 2)  # the first token of page 1 goes to page 2
    assert sequences.fork(0, 3, -1) == (1, 3)
    assert sequences.free_pages == 2
    assert sequences.popn(3, 3) == (0, 3)  # within the page of all four, into the page that it gives back
    assert sequences.popn(1, 4) is None
    assert sequences.free_pages == 2
    for sequence in range(4):
        sequences.remove(sequence)
    assert sequences.free_pages == 6


def test_a_copy_needs_a_page() -> None:
    sequences = made(pages=2)
    with pytest.raises(OutOfPages, match=r"^1 more of 2 pages of 4 tokens needed, 0 free: remove sequences"):
        sequences.fork(0, 1, 5)
    sequences.fork(0, 1, 4)
    with pytest.raises(OutOfPages):
        sequences.popn(1, 1)
    assert sequences.length(1) == 4
    assert sequences.popn(0, 3) == (0, 1)  # what it gives back is enough


def test_trees_are_checked() -> None:
    sequences = made()
    sequences.add(5)
    with pytest.raises(ValueError, match="tree_parents has 2 entries for 3 tokens"):
        sequences.begin_forward([0, 5], [1, 2], [-1, -1])
    for parent in (1, 2, -2):
        with pytest.raises(ValueError, match=f"token 1 of sequence 5 has the parent {parent}"):
            sequences.begin_forward([0, 5], [1, 2], [-1, -1, parent])
    with pytest.raises(ValueError, match="no token tree is to be committed"):
        sequences.accepted_paths([0], [0])
    forward(sequences, {0: 1, 5: 3}, [-1, -1, 0, 0])
    for call in (lambda: forward(sequences, {0: 1}), lambda: sequences.fork(5, 6, 1), lambda: sequences.popn(0, 1)):
        with pytest.raises(RuntimeError, match="call commit_tree first"):
            call()
    with pytest.raises(ValueError, match=r"told of sequences \[0\], and the last forward had trees of \[0, 5\]"):
        sequences.accepted_paths([0], [0])
    with pytest.raises(ValueError, match="1 sequences with 2 leaves"):
        sequences.accepted_paths([0], [0, 1])
    with pytest.raises(ValueError, match=r"leaf 3 of sequence 5: its tree has nodes 0 … 2, and -1 is none"):
        sequences.accepted_paths([5, 0], [3, 0])
    assert sequences.accepted_paths([5, 0], [2, -1]) == [[], [0, 2]]
    sequences.commit([[], [0, 2]])
    assert (sequences.length(0), sequences.length(5)) == (6, 2)


def test_the_size_of_a_tree_is_limited() -> None:
    sequences = Sequences(1, 1000, 1000, 4)
    sequences.add(0)
    with pytest.raises(ValueError, match="a token tree of 257 tokens for sequence 0, at most 256"):
        sequences.begin_forward([0], [MAX_TREE_SIZE + 1], [-1] * (MAX_TREE_SIZE + 1))
    forward(sequences, {0: MAX_TREE_SIZE}, [-1] * MAX_TREE_SIZE)


def test_what_is_removed_before_a_commit() -> None:
    sequences = made()
    sequences.add(1)
    forward(sequences, {0: 5, 1: 4}, [-1] * 9)
    sequences.remove(0)
    assert sequences.free_pages == 2  # its pages wait
    sequences.add(0)
    assert sequences.accepted_paths([1], [2]) == [[], [2]]
    sequences.commit([[], [2]])
    assert sequences.free_pages == 5
    forward(sequences, {0: 3}, [-1] * 3)
    sequences.remove(0)
    assert sequences.free_pages == 5  # nothing else waits
    forward(sequences, {1: 1})


def test_an_open_forward_is_not_changed() -> None:
    sequences = made()
    sequences.begin_forward([0], [3], [-1] * 3)
    for call in (lambda: sequences.fork(0, 1, 2), lambda: sequences.popn(0, 1)):
        with pytest.raises(RuntimeError, match="commit_tree"):
            call()
    with pytest.raises(RuntimeError, match="sequence 0 is part of the open forward: call end_forward first"):
        sequences.accepted_paths([0], [1])


def test_a_tree_knows_its_paths() -> None:
    tree = Tree([-1, 0, -1, 1, 2])
    assert tree.depths == [0, 1, 0, 2, 1]
    assert tree.branches
    assert tree.path(4) == [2, 4]
    assert tree.path(-1) == []
    assert not Tree([-1, 0, 1]).branches


def test_rope_lengths_with_a_first_forward_that_chooses_for_good() -> None:
    """Here every flag of the file holds."""
    sequences = Sequences(2, 100, 16, 4)
    sequences.add(0)
    opened = sequences.begin_forward([0], [4], [-1, 0, 0, 1])
    assert opened.positions() == [0, 1, 1, 2]
    assert opened.rope_lengths() == [3, 3, 3, 3]


def test_a_forward_is_begun_once_and_cancelled_without_a_trace() -> None:
    """Here the first forward has chosen the frequencies of sequence 1."""
    sequences = made()
    sequences.add(1)
    sequences.begin_forward([0, 1], [3, 2], [-1, 0, 0, -1, 0])
    with pytest.raises(RuntimeError, match=r"a forward is open already: call end_forward .* or cancel_forward"):
        sequences.begin_forward([0], [1])
    for sequence in (0, 1):
        with pytest.raises(RuntimeError, match="part of the open forward"):
            sequences.remove(sequence)
    for _ in range(2):  # of none that is open, it does nothing
        sequences.cancel_forward()
        assert (sequences.length(0), sequences.length(1), sequences.free_pages) == (6, 0, 4)
        assert (sequences.forward, sequences.waiting) == (None, [])
    assert sequences.begin_forward([1], [1]).rope_lengths() == [1]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("size", [0, -1, 1.5, "4", None, True])
def test_sizes_are_integers_from_1_on(place: int, size: Any) -> None:
    sizes = [4, 64, 16, 4]
    sizes[place] = size
    with pytest.raises(ValueError, match=r"should be an integer of at least 1$"):
        Sequences(*sizes)


def test_token_ids_are_read_as_they_are() -> None:
    good = torch.tensor([0, 9])
    for ids in (good, good.int()):
        check_integers(ids, "ids", 10)
    for ids in (good.bool(), good.float(), good.byte(), good[:0], good[None]):
        with pytest.raises(ValueError, match="ids are int32 or int64"):
            check_integers(ids, "ids", 10)
    with pytest.raises(ValueError, match="ids are a tensor of torch, and not a ndarray"):
        check_integers(np.array([1, 2]), "ids", 10)
    for wrong in (-1, 10, 2**32 + 1):
        with pytest.raises(ValueError, match=f"ids: {wrong} is not in 0 … 9"):
            check_integers(torch.tensor([3, wrong]), "ids", 10)


def test_embeds_have_the_shape_that_a_method_takes() -> None:
    check_embeds(torch.zeros(1, 3, 8), 1, None, 8)
    for shape in ((3, 8), (1, 3, 7), (2, 3, 8), (1, 0, 8)):
        with pytest.raises(ValueError, match=r"and this method takes \[1, n, 8\]"):
            check_embeds(torch.zeros(shape), 1, None, 8)


def test_prompts_and_chosen_tokens() -> None:
    check_prompts([[1, 2], [3]], 4)
    for prompts, message in (
        ([], "needs a token"),
        ([[1], []], "needs a token"),
        ([[4]], "outside"),
        ([[1.0]], "is 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_prompts(prompts, 4)
    check_chosen([0, 1], [0, 1], "float16")
    with pytest.raises(NonFiniteError, match=r"^the logits of prompt 2 are NaN or infinite.*65504"):
        check_chosen([0, -1], [0, 2], "float16")


def test_pages_cost_nothing_until_they_are_taken() -> None:
    """A place for as many tokens as somebody may ask for is told by what allocates it, and not by a list of numbers."""
    sequences = Sequences(2, 10**15, 16, 4)
    for number in (0, 1):
        sequences.add(number)
        forward(sequences, {number: 9})
    assert sequences.free_pages == 10**15 // 4 - 6
    sequences.remove(0)
    sequences.add(0)
    forward(sequences, {0: 16})
    assert sequences._sequences[0].pages == [0, 1, 2, 6]  # low pages first
    assert sequences.free_pages == 10**15 // 4 - 7
