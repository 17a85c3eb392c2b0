"""Token trees in generated packages, on CPU: every path of a tree is what it would be as a plain sequence."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from hf_parity.conftest import Open
from hf_parity.oracle import Oracle, some_ids
from hf_parity.test_package_parity import assert_close
from qwenspec.backend.api import Cache, Runner
from qwenspec.verify.reference import Reference

CASES = ["qwen2", "qwen3", "qwen1", "qwen2-sliding-all", "qwen3-sliding-some", "qwen3-yarn", "qwen1-logn"]
BY_LENGTH = ["qwen3-dynamic-beyond", "qwen3-longrope-long"]  # rotary frequencies that follow the length
TREES = {
    "fan": [-1, -1, -1, -1],
    "branching": [-1, 0, 0, 1, 2, 2, -1, 6, 3, 8],
    "two chains": [-1, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    "chain": [-1, 0, 1, 2],
    "one": [-1],
}


def path(parents: list[int], node: int) -> list[int]:
    return ([] if parents[node] < 0 else path(parents, parents[node])) + [node]


def verify(runner: Runner, cache: Cache, new: dict[int, np.ndarray], trees: dict[int, list[int]] | None) -> np.ndarray:
    """Logits [n, vocab] of new tokens of some sequences."""
    parents = None if trees is None else [parent for sequence in new for parent in trees[sequence]]
    cache.begin_forward(list(new), [len(tokens) for tokens in new.values()], parents)
    logits = runner.batch_verify(runner.embed(np.concatenate(list(new.values()))), cache)[0]
    cache.end_forward()
    return logits


def expected(oracle: Oracle, prefix: np.ndarray, tokens: np.ndarray, parents: list[int]) -> np.ndarray:
    """Each token's logits at the end of its own plain sequence."""
    paths = [np.concatenate([prefix, tokens[path(parents, node)]]) for node in range(len(parents))]
    return np.stack([oracle.logits(ids)[-1] for ids in paths])


def new_cache(runner: Runner, sequences: int, **settings: bool) -> Cache:
    cache = runner.create_paged_kv_cache(4, 320, 64, page_size=4, **settings)
    for sequence in range(sequences):
        cache.add_sequence(sequence)
    return cache


@pytest.mark.parametrize("case", CASES)
def test_every_path_is_a_plain_sequence(case: str, open_case: Open) -> None:
    """Of three sequences in one forward; then an accepted path of each, and decoding after it."""
    oracle, runner = open_case(case)
    random = Random(case)
    prompts = [some_ids(oracle.spec, n, seed) for seed, n in enumerate((13, 4, 21))]
    cache = new_cache(runner, len(prompts))
    verify(runner, cache, dict(enumerate(prompts)), None)
    for step in range(4):
        order = random.sample(range(3), 3)
        trees = {sequence: random.choice(list(TREES.values())) for sequence in order}
        new = {s: some_ids(oracle.spec, len(trees[s]), 10 * step + s + 100) for s in order}
        logits = verify(runner, cache, new, trees)
        assert_close(logits, np.concatenate([expected(oracle, prompts[s], new[s], trees[s]) for s in order]))
        leaves = {s: random.randrange(-1, len(trees[s])) for s in random.sample(order, 3)}
        cache.commit_tree(list(leaves), list(leaves.values()))
        for s, leaf in leaves.items():
            accepted = path(trees[s], leaf) if leaf >= 0 else []
            prompts[s] = np.concatenate([prompts[s], new[s][accepted]])
        token = some_ids(oracle.spec, 3, step)
        prompts = [np.append(prompt, one) for prompt, one in zip(prompts, token, strict=True)]
        cache.begin_forward([0, 1, 2], [1, 1, 1])
        decoded = runner.batch_decode(runner.embed(token)[0][:, None], cache)[:, 0]
        cache.end_forward()
        assert_close(decoded, np.stack([oracle.logits(ids)[-1] for ids in prompts]))


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("prefix", [0, 1, 7, 8, 30])
@pytest.mark.parametrize("case", ["qwen3", "qwen2-sliding-all"])
def test_after_any_prefix(case: str, prefix: int, tree: str, open_case: Open) -> None:
    oracle, runner = open_case(case)
    parents, prompt = TREES[tree], some_ids(oracle.spec, prefix)
    cache = new_cache(runner, 1)
    if prefix:
        verify(runner, cache, {0: prompt}, None)
    tokens = some_ids(oracle.spec, len(parents), 1)
    logits = verify(runner, cache, {0: tokens}, {0: parents})
    assert_close(logits, expected(oracle, prompt, tokens, parents))


@pytest.mark.parametrize("case", ["qwen3", "qwen2-sliding-all"])
def test_a_tree_as_large_as_may_be(case: str, open_case: Open) -> None:
    """Several blocks of queries, and branches between distant tokens."""
    oracle, runner = open_case(case)
    random = Random(0)
    parents = [random.choice([node - 1, random.randrange(-1, node)]) for node in range(256)]
    prompt, tokens = some_ids(oracle.spec, 9), some_ids(oracle.spec, 256, 1)
    cache = runner.create_paged_kv_cache(1, 300, 256, page_size=16)
    cache.add_sequence(0)
    verify(runner, cache, {0: prompt}, None)
    logits = verify(runner, cache, {0: tokens}, {0: parents})
    some = [*random.sample(range(256), 12), 255]
    wanted = [oracle.logits(np.concatenate([prompt, tokens[path(parents, node)]]))[-1] for node in some]
    assert_close(logits[some], np.stack(wanted))


@pytest.mark.parametrize("case", BY_LENGTH)
def test_frequencies_that_follow_the_length(case: str, open_case: Open) -> None:
    """A path has the frequencies that decoding it token by token would have given it."""
    oracle, runner = open_case(case)
    for prefix in (6, 13, 30):
        prompt, parents = some_ids(oracle.spec, prefix), TREES["branching"]
        tokens = some_ids(oracle.spec, len(parents), 1)
        reference = Reference(oracle.spec, oracle.weights())
        cache = new_cache(runner, 1)
        verify(runner, cache, {0: prompt}, None)
        logits = verify(runner, cache, {0: tokens}, {0: parents})
        for node in range(len(parents)):
            sequence = reference.sequence()
            sequence.forward(prompt)
            for token in tokens[path(parents, node)]:
                wanted = sequence.forward(np.array([token], dtype=np.int32))
            assert_close(logits[node : node + 1], wanted)
        cache.commit_tree([0], [8])
        sequence = reference.sequence()
        sequence.forward(prompt)
        for token in tokens[path(parents, 8)]:
            sequence.forward(np.array([token], dtype=np.int32))
        assert_close(verify(runner, cache, {0: tokens[:3]}, None), sequence.forward(tokens[:3]))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_pages_behind_every_window_are_given_back(open_case: Open) -> None:
    oracle, runner = open_case("qwen2-sliding-all")
    cache = new_cache(runner, 1, support_sliding_window=True)
    ids = some_ids(oracle.spec, 20)
    verify(runner, cache, {0: ids}, None)
    for step, (parents, leaf) in enumerate([(TREES["branching"], 9), (TREES["fan"], -1), (TREES["two chains"], 11)]):
        tokens = some_ids(oracle.spec, len(parents), step + 1)
        logits = verify(runner, cache, {0: tokens}, {0: parents})
        assert_close(logits, expected(oracle, ids, tokens, parents))
        cache.commit_tree([0], [leaf])
        ids = np.concatenate([ids, tokens[path(parents, leaf) if leaf >= 0 else []]])


def test_trees_on_shared_pages(open_case: Open) -> None:
    """A fork's tree leaves its parent alone, and a sequence may go while its tree waits."""
    oracle, runner = open_case("qwen3")
    ids, parents = some_ids(oracle.spec, 18), TREES["branching"]
    cache = new_cache(runner, 1)
    verify(runner, cache, {0: ids}, None)
    cache.fork_sequence(0, 1)
    cache.fork_sequence(0, 2, at=7)
    tokens = {s: some_ids(oracle.spec, len(parents), s) for s in (2, 0, 1)}
    logits = verify(runner, cache, tokens, dict.fromkeys(tokens, parents))
    prefixes = {2: ids[:7], 0: ids, 1: ids}
    assert_close(logits, np.concatenate([expected(oracle, prefixes[s], tokens[s], parents) for s in tokens]))
    cache.remove_sequence(2)
    cache.commit_tree([0, 1], [4, 7])
    for sequence, leaf in ((0, 4), (1, 7)):
        kept = np.concatenate([ids, tokens[sequence][path(parents, leaf)]])
        new = some_ids(oracle.spec, 5, 9)
        wanted = oracle.logits(np.concatenate([kept, new]))[-5:]
        assert_close(verify(runner, cache, {sequence: new}, None), wanted)
