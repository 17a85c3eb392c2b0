"""Tables on the terminal as results come, and the same as data."""

from __future__ import annotations

from typing import Any


class Report:
    """What was checked and measured. `failures` and `misses` decide the exit code."""

    def __init__(self) -> None:
        self.sections: list[dict[str, Any]] = []
        self.failures: list[str] = []  # wrong results
        self.misses: list[str] = []  # speed goals not reached

    def table(self, title: str, *columns: str) -> None:
        self.sections.append({"title": title, "columns": columns, "rows": []})
        print(f"\n{title}\n" + self._line(columns))

    def row(self, *cells: str) -> None:
        self.sections[-1]["rows"].append(cells)
        print(self._line(cells), flush=True)

    def check(self, ok: bool, *cells: str) -> None:
        """A row that must be right."""
        self.row(*cells, "ok" if ok else "WRONG")
        if not ok:
            self.failures.append(": ".join(cells))

    def goal(self, ok: bool, *cells: str) -> None:
        """A row that should be fast."""
        self.row(*cells, "PASS" if ok else "MISS")
        if not ok:
            self.misses.append(": ".join(cells))

    def _line(self, cells: tuple[str, ...]) -> str:
        width = 26 if len(self.sections[-1]["columns"]) <= 5 else 16
        return "  " + "".join(f"{cell:<{width - 1}} " for cell in cells).rstrip()
