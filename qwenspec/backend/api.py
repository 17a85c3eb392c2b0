"""The protocols that a backend keeps. A backend lives in its own distribution package and registers an entry
point in the group `qwenspec.backends` that names an object with the shape of `Backend`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwenspec.diagnostics import Diagnostic
from qwenspec.ir.nodes import Model

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Ints = npt.NDArray[np.int32]


class Cache(Protocol):
    """A paged KV cache. Sequence ids are the caller's own integers."""

    def add_sequence(self, seq_id: int, prompt_length: int | None = None) -> None:
        """Start an empty sequence. `prompt_length` matters to dynamic RoPE alone: the whole prompt's length when
        it will be prefilled in chunks (default: the length of the first forward)."""

    def remove_sequence(self, seq_id: int) -> None: ...

    def fork_sequence(self, parent: int, child: int, at: int = -1) -> None:
        """`child` starts with the first `at` tokens of `parent` (-1: all of them). Full pages are shared, and what is
        left over is copied; raises when that needs a page and none is free."""

    def popn(self, seq_id: int, n: int) -> None:
        """Forget the last n tokens. A page that is shared and of which a part stays is copied, as by a fork."""

    def begin_forward(
        self, seq_ids: Sequence[int], lengths: Sequence[int], tree_parents: Sequence[int] | None = None
    ) -> None:
        """Make room for lengths[i] new tokens of seq_ids[i]; raises and changes nothing when pages run out.

        `tree_parents`: the new tokens of each sequence are a tree, at most 256 of them. For each token, the number of
        its parent among its sequence's new tokens, smaller than its own, or -1 if it follows the sequence. A token's
        position is the sequence's length plus its depth, and it sees the sequence, its ancestors and itself. Dynamic
        RoPE takes each path as if it had been decoded token by token. `batch_verify` computes the logits, and
        `commit_tree` must follow before the next forward."""

    def end_forward(self) -> None: ...

    def cancel_forward(self) -> None:
        """Close the open forward, if there is one, as if it had not been begun: its new tokens are taken back."""

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""

    def commit_tree(self, seq_ids: Sequence[int], leaves: Sequence[int]) -> None:
        """After a forward with trees: of seq_ids[i], keep new token leaves[i] and its ancestors, or none for -1.

        Names each sequence of that forward once, in any order, but for those that have been removed since. The pages
        of removed ones are free when the others are committed, or removed too."""


class Runner(Protocol):
    """A generated package with weights, behind numpy. Embeddings and logits are float32 whatever the model's
    dtype (bfloat16 has no numpy dtype; the conversion is exact). `n` counts the tokens of all sequences, in the
    order of begin_forward; `b` counts sequences. For a text-embedding model read `hidden` for `vocab`."""

    def embed(self, ids: Ints) -> Floats:
        """ids [n] -> [1, n, hidden]."""

    def prefill(self, embeds: Floats, cache: Cache) -> Floats:
        """[1, n, hidden] -> logits of the last token [1, 1, vocab]."""

    def decode(self, embeds: Floats, cache: Cache) -> Floats:
        """[1, 1, hidden] -> [1, 1, vocab]."""

    def batch_prefill(self, embeds: Floats, logit_positions: Ints, cache: Cache) -> Floats:
        """[1, n, hidden], positions [b] in 0 … n-1 -> [1, b, vocab]."""

    def batch_decode(self, embeds: Floats, cache: Cache) -> Floats:
        """[b, 1, hidden] -> [b, 1, vocab]."""

    def batch_verify(self, embeds: Floats, cache: Cache) -> Floats:
        """[1, n, hidden] -> logits of every token [1, n, vocab]."""

    def create_paged_kv_cache(
        self,
        max_batch_size: int,
        max_total_seq_len: int,
        prefill_chunk_size: int,
        page_size: int = 16,
        support_sliding_window: bool = False,
    ) -> Cache: ...

    def taps(self, ids: Ints, cache: Cache) -> Mapping[str, Floats]:
        """Runs the open forward on its ids [n], whatever it is made of, as `batch_verify` would, and returns every
        module's output by its address, in the order of execution, and the `logits` of every token last [n, vocab].

        Projections and norms are [n, features]; of a layer the residual stream after it [n, hidden]. Of what kernels
        fuse in `layers.i.attention`: `q_norm` and `k_norm` where the variant has them, `q` and `k` as the scores are
        made of them (after RoPE and LogN), each [n, heads, head_dim], and `context`, which o_proj reads:
        [n, num_heads, head_dim], or with heads and dimensions in one. Kernels run more often than in `batch_verify`,
        the cache changes alike."""


class Backend(Protocol):
    """Turns the IR into files, and opens what it wrote."""

    name: str
    libraries: tuple[str, ...]  # distributions that its packages import at run time, for `qwenspec backends`

    def unsupported(self, model: Model) -> list[Diagnostic]:
        """What this backend cannot emit yet, said before anything is written."""

    def emit(self, model: Model) -> dict[str, str]:
        """Path inside the package -> text, unformatted and without banner."""

    def unavailable(self) -> Diagnostic | None:
        """Why this backend cannot run here (a missing library, with the command that installs it), or None."""

    def devices(self) -> Sequence[str]:
        """Where packages can run here, as `open` takes it, each with its hardware's name if it has one
        (`cpu`, `cuda:0 NVIDIA H200`). Asked only when `unavailable()` is None."""

    def open(self, package: Path, weights: Path, device: str, dtype: str | None) -> Runner:
        """Import the package folder and load a checkpoint folder."""
