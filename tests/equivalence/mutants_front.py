"""Planted mistakes in what is refused: wrong calls, weights and logits that are not finite, libraries of others."""

from __future__ import annotations

from mutant import RUNTIME, TRITON, TVM, Mutant

CHECKS = f"{RUNTIME}/checks.py"
SEQUENCES = f"{RUNTIME}/sequences.py"
GENERATION = f"{RUNTIME}/generation.py"
KEPT = f"{TVM}/runtime/kept.py"
BOOKS = ("tests/unit/test_sequences.py",)
CALLS = ("tests/backends/test_wrong_calls.py",)
CACHE = ("tests/backends/tvm/test_tvm_build.py",)

FRONT_MUTANTS = (
    Mutant(
        "begin_twice",
        SEQUENCES,
        """    def _check_forward(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> list[CachedSequence]:
        if self.forward:
""",
        """    def _check_forward(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> list[CachedSequence]:
        if self.forward and not seq_ids:
""",
        "a token that was never computed stays in the cache, and is attended to",
        tests=BOOKS,
    ),
    Mutant(
        "remove_in_an_open_forward",
        SEQUENCES,
        """        self._check_closed(seq_id, sequence)
        del self._sequences[seq_id]
""",
        """        del self._sequences[seq_id]
""",
        "its pages are another sequence's while the forward still writes to them",
        tests=BOOKS,
    ),
    Mutant(
        "cancel_keeps_a_token",
        SEQUENCES,
        """            sequence.length -= n
            sequence.tree = None
            self._give""",
        """            sequence.length -= n - 1
            sequence.tree = None
            self._give""",
        "a forward that failed leaves no token behind",
        tests=BOOKS,
    ),
    Mutant(
        "cancel_keeps_pages",
        SEQUENCES,
        """            self._give_back(sequence, -(-sequence.length // self.page_size))
        self.waiting""",
        """        self.waiting""",
        "pages of a forward that failed are free again",
        tests=BOOKS,
    ),
    Mutant(
        "cancel_leaves_trees_waiting",
        SEQUENCES,
        """        self.waiting = []
        self.forward = None
""",
        """        self.forward = None
""",
        "nothing of a cancelled tree can be committed",
        tests=BOOKS,
    ),
    Mutant(
        "page_size_0",
        SEQUENCES,
        """        check_integer("page_size", page_size, least=1)
""",
        """""",
        "a division by zero tells nobody what to change",
        tests=BOOKS,
    ),
    Mutant(
        "bools_are_integers",
        CHECKS,
        " and not isinstance(value, bool)",
        "",
        "True is no number of tokens",
        tests=BOOKS,
    ),
    Mutant(
        "ids_of_any_dtype",
        CHECKS,
        "if dtype not in INTEGERS or len(shape)",
        "if len(shape)",
        "1.5 and True become the token 1",
        tests=BOOKS,
    ),
    Mutant(
        "negative_positions",
        CHECKS,
        "if numbers.min() < 0 or numbers.max() >= end:",
        "if numbers.min() < -end or numbers.max() >= end:",
        "-1 is the last position in one backend, and memory before the first in another",
        tests=BOOKS,
    ),
    Mutant(
        "any_number_of_rows",
        CHECKS,
        "if len(shape) != 3 or 0 in shape or any(",
        "if len(shape) != 3 or any(",
        "a forward of no token has no last one",
        tests=BOOKS,
    ),
    Mutant(
        "prompts_past_the_vocabulary",
        GENERATION,
        "if not 0 <= token < vocab_size:",
        "if not 0 <= token <= vocab_size:",
        "compiled code reads beyond the embedding",
        tests=BOOKS,
    ),
    Mutant(
        "not_finite_is_a_token",
        GENERATION,
        "if -1 in tokens:",
        "if tokens == [-1]:",
        "one prompt of a batch may overflow alone",
        tests=BOOKS,
    ),
    Mutant(
        "triton_chooses_by_nan",
        f"{TRITON}/runtime/generate.py",
        "~logits.isfinite().all(-1)",
        "~logits.isfinite().any(-1)",
        "float16 overflow prints an answer and ends with 0",
        tests=CALLS,
    ),
    Mutant(
        "tvm_chooses_by_nan",
        f"{TVM}/runtime/generate.py",
        "np.isfinite(logits).all(-1)",
        "np.isfinite(logits).any(-1)",
        "float16 overflow prints an answer and ends with 0",
        tests=CALLS,
    ),
    Mutant(
        "weights_are_not_looked_at",
        f"{TVM}/runtime/weights.py",
        "if not finite(piece):",
        "if piece is None:",
        "a damaged checkpoint is told when it is loaded",
        tests=CALLS,
    ),
    Mutant(
        "cache_for_all",
        KEPT,
        "mode=0o700",
        "mode=0o777",
        "what lies in the cache runs: nobody else may write there",
        tests=CACHE,
    ),
    Mutant(
        "owner_not_checked",
        KEPT,
        "if found.st_uid not in (os.geteuid(), 0):",
        "if found.st_uid < 0:",
        "another user's library runs as this one",
        tests=CACHE,
    ),
    Mutant(
        "links_followed",
        KEPT,
        "if stat.S_ISLNK(found.st_mode):",
        "if found.st_mode == 0:",
        "a link may lead to another user's library",
        tests=CACHE,
    ),
    Mutant(
        "library_of_something_else_stays",
        f"{TVM}/runtime/library.py",
        """        module["vm_load_executable"]  # AttributeError where the file holds something else
""",
        """""",
        "a file that is no library fails on every run, and is never compiled again",
        tests=CACHE,
    ),
    Mutant(
        "group_outlives_the_interpreter",
        f"{RUNTIME}/ranks.py",
        """        import torch.distributed.nn

""",
        """""",
        "a thread of the process group frees a tensor without the interpreter, and aborts",
        tests=("tests/distributed/test_joining.py",),
    ),
    Mutant(
        "store_goes_while_another_leaves",
        "qwenspec/backend/runtime/meeting.py",
        '                self.agree("left")\n',
        "",
        "on a busy machine a rank that has answered ends with an error",
        tests=("tests/distributed/test_joining.py",),
    ),
    Mutant(
        "ranks_tell_at_once",
        "qwenspec/backend/runtime/meeting.py",
        """            if store.first(f"tells/{self.host}", me) != me:
                store.wait(key, seconds=TELL_SECONDS)  # a launcher ends all when the first has ended
                return
""",
        """            if store.has(key):
                return
""",
        "on a busy machine a cause is printed by several ranks",
        tests=("tests/distributed/test_failing.py",),
    ),
)
