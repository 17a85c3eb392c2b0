"""Looking for a disagreement: Hypothesis draws cases and workloads, and makes the first failure as small as it can."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hypothesis
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test

from qwenspec.spec.document import Spec
from qwenspec.verify.case import HUGGING_FACE, REFERENCE, Case
from qwenspec.verify.features import features
from qwenspec.verify.huggingface import obstacle
from qwenspec.verify.ledger import Ledger
from qwenspec.verify.machine import MAX_LENGTH, OutOfMemory, workload
from qwenspec.verify.session import Disagreement, Session
from qwenspec.verify.steps import CacheSizes


@st.composite
def cases(
    draw: st.DrawFn,
    specs: st.SearchStrategy[Spec],
    sizes: st.SearchStrategy[CacheSizes],
    backends: Sequence[str],
    dtypes: Sequence[str] = ("float32",),
    hugging_face: bool = True,
) -> Case:
    """A spec with random weights on these backends, and on Hugging Face where that has all its features.

    dtypes: the first is drawn the most often."""
    spec = draw(specs)
    dtype = draw(st.just(dtypes[0]) | st.sampled_from(dtypes))
    with_hugging_face = hugging_face and dtype == "float32" and obstacle(spec) is None
    contenders = (REFERENCE, *backends, *((HUGGING_FACE,) if with_hugging_face else ()))
    return Case(spec, draw(st.integers(0, 9999)), dtype, draw(sizes), contenders)


def search(
    cases: st.SearchStrategy[Case],
    sizes: st.SearchStrategy[CacheSizes],
    *,
    examples: int,
    steps: int,
    seed: int,
    ledger: Ledger,
    settings: hypothesis.settings | None = None,
    on_start: Callable[[Session], None] = lambda session: None,
    on_disagreement: Callable[[Disagreement], None] = lambda disagreement: None,
    max_length: int = MAX_LENGTH,
) -> Disagreement | None:
    """Draw `examples` cases with workloads of up to `steps` draws each; the smallest disagreement, if there is one.

    `on_start` is told of every example that begins, and `on_disagreement` of every disagreement: of those on the way to
    the smallest too. Other errors are raised as they are. The same seed draws the same examples."""
    found: list[Disagreement] = []

    def count(session: Session) -> None:
        ledger.example(session.case, features(session.case.spec), session.pairs)
        on_start(session)

    def keep(disagreement: Disagreement) -> None:
        found.append(disagreement)
        on_disagreement(disagreement)

    machine = hypothesis.seed(seed)(workload(cases, sizes, ledger, count, keep, max_length))
    limits = hypothesis.settings(settings or DEFAULTS, max_examples=examples, stateful_step_count=steps)
    try:
        run_state_machine_as_test(machine, settings=limits)
    except Disagreement as disagreement:
        return disagreement
    except OutOfMemory as stop:
        raise stop.error from None
    except Flaky:
        if not found:
            raise
        return found[-1]
    return None


DEFAULTS = hypothesis.settings(
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)
