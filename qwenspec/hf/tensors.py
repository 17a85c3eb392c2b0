"""The tensors that a spec expects of its checkpoint, compared with those that it holds."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatch

from qwenspec.diagnostics import listed
from qwenspec.hf.config import Report
from qwenspec.ir.lower import lower
from qwenspec.ir.quantized import stored_tensors
from qwenspec.spec.document import Spec

SHOWN = 5  # names in one message


def is_prefixless(names: Collection[str]) -> bool:
    """Whether the backbone was saved alone, without `model.` before its names."""
    return any(name in names for name in ("embed_tokens.weight", "embed_tokens.qweight"))


def has_head(names: Collection[str]) -> bool:
    """Whether a backbone that was saved alone has an LM head: an embedding is quantised only if it is the head too."""
    return any(name in names for name in ("lm_head.weight", "lm_head.qweight", "embed_tokens.qweight"))


def expected(spec: Spec) -> tuple[set[str], tuple[str, ...]]:
    """Tensors that the checkpoint must hold, and patterns (fnmatch) of further ones that it may."""
    model = lower(spec)
    must: set[str] = set()
    may = [*model.ignored_tensors, *model.zero_tensors]
    for param in model.params():
        for source in param.sources:
            if source.format is None:
                must.add(source.tensor)
                continue
            for tensor in stored_tensors(source, param.shape[1]).values():
                if tensor.optional:
                    may.append(tensor.name)
                else:
                    must.add(tensor.name)
    return must, tuple(may)


def check(spec: Spec, names: Collection[str], report: Report) -> None:
    """Report tying that does not fit, tensors that are missing and tensors that nobody reads."""
    must, may = expected(spec)
    head = f"{spec.layout.lm_head}.weight"
    if head in must and head not in names:
        must.discard(head)
        report.error(
            "tying",
            f"the embedding is not tied, and the checkpoint has no `{head}`",
            ("tie_word_embeddings",),
            "set tie_word_embeddings to true if the two share one tensor",
        )
    elif head in may and head in names:
        report.notes.append(f"The checkpoint holds `{head}`, which is not read: the embedding is tied.")
    _tell(report, "missing-tensor", "the checkpoint lacks", sorted(must.difference(names)))
    unread = sorted(set(names) - must)
    unknown = [name for name in unread if not any(fnmatch(name, pattern) for pattern in may)]
    _tell(report, "unknown-tensor", "no parameter of this model reads", unknown)


def _tell(report: Report, code: str, said: str, names: list[str]) -> None:
    if len(names) > SHOWN:
        report.error(code, f"{said} {listed(names[:SHOWN], ',')} and {len(names) - SHOWN} more".replace(" ,", ","))
    elif names:
        report.error(code, f"{said} {listed(names, 'and')}")
