"""The tensors that a spec expects of its checkpoint, compared with those that it holds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenspec.backend import fitting
from qwenspec.backend.runtime.stored import Stored, Tensor, wrapper
from qwenspec.hf.config import Report
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Model
from qwenspec.spec.base import Dtype
from qwenspec.spec.document import Spec

DTYPES: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
SHOWN = 5  # tensors in one message
CODES = {"missing": "missing-tensor", "shape": "wrong-shape", "dtype": "wrong-dtype", "left over": "unknown-tensor"}


@dataclass(frozen=True, slots=True)
class Held:
    """What a checkpoint holds.

    unseen: tensors of files that are not there: of them the index has the names alone
    notes: what a person should know about the choice of files"""

    stored: Mapping[str, Stored]
    unseen: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        return {*self.stored, *self.unseen}


def is_prefixless(names: Collection[str]) -> bool:
    """Whether the backbone was saved alone, without `model.` before its names."""
    return any(name.startswith(("embed_tokens.", "layers.0.")) for name in names)


def has_head(names: Collection[str]) -> bool:
    """Whether a backbone that was saved alone has an LM head: an embedding is quantised only if it is the head too."""
    return any(name in names for name in ("lm_head.weight", "lm_head.qweight", "embed_tokens.qweight"))


def expected(spec: Spec) -> tuple[set[str], tuple[str, ...]]:
    """Tensors that the checkpoint must hold, and patterns (fnmatch) of further ones that it may."""
    model = lower(spec)
    tensors = [tensor for _, tensor in fitting.wanted(model)]
    optional = (tensor.name for tensor in tensors if tensor.optional)
    return {tensor.name for tensor in tensors if not tensor.optional}, (*fitting.allowed(model), *optional)


def check(spec: Spec, held: Held, report: Report) -> None:
    """Report tying that does not fit and, in the words of a package that loads it, whatever is wrong with a tensor."""
    if told := wrapper(held.names):
        report.error("wrapped-model", told)
        return
    model, found = lower(spec), dict(held.stored)
    needed = {tensor.name: tensor for _, tensor in fitting.wanted(model)}
    if model.tied_tensor:
        needed[model.tied_tensor] = needed[model.tied_names[0]]
    found |= {name: _presumed(name, needed.get(name)) for name in held.unseen}
    problems: dict[str, list[str]] = {}
    for problem in fitting.problems(model, found):
        kind, _, said = problem.partition(": ")
        problems.setdefault(kind, []).append(said)
    head = f"{spec.layout.lm_head}.weight"
    if lost := [said for said in problems.get("missing", ()) if said.startswith(f"{head} ")]:
        problems["missing"].remove(lost[0])
        report.error(
            "tying",
            f"the embedding is not tied, and the checkpoint has no `{head}`",
            ("tie_word_embeddings",),
            "set tie_word_embeddings to true if the two share one tensor",
        )
    _note_tied(model, found, report)
    for kind, tensors in problems.items():
        more = f"; and {len(tensors) - SHOWN} more" if len(tensors) > SHOWN else ""
        if tensors:
            report.error(CODES[kind], f"{kind}: {'; '.join(tensors[:SHOWN])}{more}")


def _presumed(name: str, needed: Tensor | None) -> Stored:
    """A tensor that is not there yet: what it will be, if it is asked for."""
    dtype, shape = (needed.dtypes[0], needed.shape) if needed else ("", ())
    return Stored(Path(), name, dtype, shape, 0, 0)


def _note_tied(model: Model, stored: Mapping[str, Stored], report: Report) -> None:
    if not model.tied_tensor or model.tied_tensor not in stored:
        return
    if model.tied_names[0] in stored:
        report.notes.append(f"The checkpoint holds `{model.tied_tensor}`, which is not read: the embedding is tied.")
    else:
        report.notes.append(
            f"The tied embedding is read from `{model.tied_tensor}`, under which the checkpoint has it."
        )


def main_dtype(held: Held) -> Dtype | None:
    """The dtype of most numbers in full precision; None where there are none."""
    sizes = dict.fromkeys(DTYPES, 0)
    for tensor in held.stored.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += math.prod(tensor.shape)
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return DTYPES[most] if sizes[most] else None
