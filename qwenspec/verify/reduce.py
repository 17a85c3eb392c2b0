"""A spec at a size where the float64 reference is quick: the same structure, and lengths that short sequences pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from qwenspec.spec.architecture import Architecture
from qwenspec.spec.attention import LayersFrom, SlidingWindow
from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Awq, Fp8Block, Gptq, Int4, PackQuantized
from qwenspec.spec.rope import Dynamic, DynamicQwen1, LongRope
from qwenspec.spec.rules import RULES
from qwenspec.verify.reference import window_of_layer

VOCABULARY = 499  # prime: nothing divides it
HIDDEN = 96  # where the heads' width does not decide
INTERMEDIATE = 176
WIDTH = 1024  # heads · head_dim, at most
KV_HEADS = 2
HEADS = 4  # where each has keys of its own
LENGTH = 12  # the first length at which something changes
LONGEST = 512  # max_position_embeddings, where nothing changes there

Tree = dict[str, Any]


def reduced(spec: Spec) -> Spec:
    """The spec with smaller sizes, and every switch as it is.

    Query heads a KV head, their width (up to 128) and whether heads · head_dim is the hidden size are kept, within
    `WIDTH`; of the layers two, or three where some slide and some do not. Lengths shrink together."""
    tree = spec.model_dump(mode="json", by_alias=True)
    arch = tree["architecture"]
    _shrink_layers(spec, tree)
    _shrink_lengths(spec.architecture, arch)
    for sizes, head_dim in _sizes(spec):
        arch |= sizes
        if spec.architecture.attention.head_dim is not None:
            arch["attention"]["head_dim"] = head_dim
        found = Spec.model_validate(tree, strict=False).model_copy(update={"file": spec.file})
        if not any(mistake for rule in RULES for mistake in rule.check(found)):
            return found
    return spec


# ------------------------------------------------------------------------------------------------------- sizes


def _sizes(spec: Spec) -> Iterator[tuple[Tree, int]]:
    """Sizes to try, the smallest first, each with the heads' width."""
    arch, unit = spec.architecture, _unit(spec)
    kv_heads = arch.num_key_value_heads or arch.num_attention_heads
    group = arch.num_attention_heads // kv_heads
    head_dim = arch.attention.head_dim or arch.hidden_size // arch.num_attention_heads
    for kept_dim in dict.fromkeys(
        (head_dim if isinstance(arch.rope.scaling, LongRope) else min(head_dim, 128), head_dim)
    ):
        for fewer in (KV_HEADS if group > 1 else HEADS, 8, 16):
            fewer = min(fewer, kv_heads)
            heads = fewer * _smaller_group(group, fewer * kept_dim)
            sizes = {
                "vocab_size": min(arch.vocab_size, VOCABULARY),
                "hidden_size": _hidden(arch, arch.num_attention_heads * head_dim, heads * kept_dim, unit),
                "num_attention_heads": heads,
                "num_key_value_heads": None if arch.num_key_value_heads is None else fewer,
                "intermediate_size": _like(arch.intermediate_size, min(arch.intermediate_size, INTERMEDIATE), unit),
            }
            yield sizes, kept_dim


def _smaller_group(group: int, width: int) -> int:
    """Query heads a KV head: as many, or fewer that are odd if they were, so that all are not too wide."""
    most = max(WIDTH // width, 2)
    return group if group <= most else max(2, most - (most - group) % 2)


def _hidden(arch: Architecture, width: int, new_width: int, unit: int) -> int:
    """A hidden size that is to the new width of all heads (equal, less or more) as it was to the old one."""
    old = arch.hidden_size
    size = _like(old, min(old, HIDDEN), unit)
    if old == width:
        return new_width
    if old > width:
        return max(size, _like(old, new_width + 1, unit))
    below = new_width - 1 - (new_width - 1 - old) % unit
    return min(size, below if below > 0 else unit)


def _like(size: int, least: int, unit: int) -> int:
    """The smallest size from `least` on that has as much more than whole units as `size` has: a last group or block
    that has fewer stays one."""
    return least + (size - least) % unit


def _unit(spec: Spec) -> int:
    """What groups and blocks of weights divide, and words."""
    match spec.quantization:
        case Fp8Block(block=block):
            return math.lcm(*block)
        case Awq(group_size=size) | Gptq(group_size=size) | PackQuantized(group_size=size) | Int4(group_size=size):
            return math.lcm(max(size, 1), 8)
        case _:
            return 1


# ------------------------------------------------------------------------------------------------------ layers


def _shrink_layers(spec: Spec, tree: Tree) -> None:
    """Two layers, or three with the kinds of the first and of another: A B A."""
    arch = spec.architecture
    sliding, count = arch.attention.sliding_window, arch.num_hidden_layers
    windows = [window_of_layer(sliding, layer) for layer in range(count)]
    layers = min(count, 3 if len(set(windows)) > 1 else 2)
    if sliding is not None:
        tree["architecture"]["attention"]["sliding_window"]["layers"] = _kept_layers(sliding, windows, layers)
    tree["architecture"]["num_hidden_layers"] = layers
    if spec.quantization is not None:
        gone = [f"{spec.layout.layer.replace('{i}', str(layer))}." for layer in range(layers, count)]
        kept = [name for name in spec.quantization.skip if not name.startswith(tuple(gone))]
        tree["quantization"]["skip"] = kept


def _kept_layers(sliding: SlidingWindow, windows: list[int | None], layers: int) -> Any:
    match sliding.layers:
        case "all":
            return "all"
        case LayersFrom(from_=first):
            return {"from": 0 if first == 0 else layers if first >= len(windows) else 1}
        case tuple():
            if None not in windows:
                return list(range(layers))
            return [layer for layer in range(layers) if (windows[0] is not None) == (layer % 2 == 0)]


# ----------------------------------------------------------------------------------------------------- lengths


def _shrink_lengths(arch: Architecture, tree: Tree) -> None:
    """Lengths at which something changes become LENGTH, and up to twice that for each longer one, in proportion.

    Lengths that are equal stay so, and max_position_embeddings keeps its ratio to the original length."""
    scaling, window, logn = arch.rope.scaling, arch.attention.sliding_window, arch.attention.logn
    original = getattr(scaling, "original_max_position_embeddings", None)
    longest = arch.max_position_embeddings
    lengths: set[int | None] = {
        window.window if window else None,
        logn.train_length if logn else None,
        scaling.train_length if isinstance(scaling, DynamicQwen1) else None,
        longest if isinstance(scaling, Dynamic) else None,
        original,
    }
    ordered = sorted(length for length in lengths if length is not None)
    new = {length: _new_length(length, ordered[0], rank) for rank, length in enumerate(ordered)}

    if window:
        tree["attention"]["sliding_window"]["window"] = new[window.window]
    if logn:
        tree["attention"]["logn"]["train_length"] = new[logn.train_length]
    if isinstance(scaling, DynamicQwen1):
        tree["rope"]["scaling"]["train_length"] = new[scaling.train_length]
    if original is not None:
        tree["rope"]["scaling"]["original_max_position_embeddings"] = new[original]
        tree["max_position_embeddings"] = round(new[original] * longest / original)
    else:
        tree["max_position_embeddings"] = new.get(longest, min(longest, LONGEST))


def _new_length(length: int, first: int, rank: int) -> int:
    proportional = round(length * min(1.0, LENGTH / first))
    return min(proportional, LENGTH << rank)
