"""A planted mistake, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

LOWER = "qwenspec/ir/lower.py"
ROPE = "qwenspec/ir/rope.py"
WEIGHTS = "qwenspec/ir/weights.py"
SHARD = "qwenspec/ir/shard.py"
SHARES = "qwenspec/ir/shares.py"
STRUCTURE = "qwenspec/backend/structure.py"
QUANTIZED_IR = "qwenspec/ir/quantized.py"
RUNTIME = "qwenspec/backend/runtime"
QUANTIZED = f"{RUNTIME}/quantized.py"
TRITON = "backends/qwenspec_triton"
TVM = "backends/qwenspec_tvm"


@dataclass(frozen=True)
class Mutant:
    """One text of one source file, and what stands there by mistake.

    `old` occurs once in `file`, a path in the repository. `lesson`: what goes wrong, and threads in which it did.
    `tests`: the files that must notice it, where it is not the equivalence suite."""

    name: str
    file: str
    old: str
    new: str
    lesson: str
    interpreted: bool = False  # the code runs in Triton's interpreter alone
    tests: tuple[str, ...] = ()

    def apply(self, root: Path) -> None:
        """Write the mistake into the copy of the repository at `root`. Raises ValueError unless `old` is there once."""
        path = root / self.file
        source = path.read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has the text {source.count(self.old)} times:\n{self.old}")
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")
