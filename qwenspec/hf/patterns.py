"""Regular expressions of config.json, which name modules by the beginning of their names, as `re.match` does."""

from __future__ import annotations

import re
from typing import Any

from qwenspec.hf.config import Config, shown

LONGEST = 64  # characters of a module's name
MOST_WAYS = (LONGEST + 1) ** 4  # four `.*` one after the other: milliseconds a name


def compiled(config: Config, key: str, expression: str, after: str = "") -> re.Pattern[str] | None:
    """An expression written under `key`, and what must match after it; None after reporting that it is none."""
    try:
        pattern = re.compile(f"(?:{expression}){after}" if after else expression)
        ways = _ways(re._parser.parse(pattern.pattern))  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError) as error:
        message = f"`{key}` has {expression!r}, which is no regular expression: {error}"
        config.error("wrong-value", message, key)
        return None
    if ways > MOST_WAYS:
        message = f"`{key}` has {shown(expression)}, which may take for ever to match"
        config.error(
            "unsupported-value",
            message,
            key,
            "write it with fewer repetitions and alternatives, and none inside a repetition",
        )
        return None
    return pattern


def _ways(parsed: Any) -> int:
    """At most so many ways are tried to match a part of an expression, cut where there are too many."""
    ways = 1
    for operation, given in parsed:
        if str(operation).endswith("REPEAT"):
            least, most, repeated = given
            once, rounds = _ways(repeated), min(most, LONGEST)
            ways *= sum(once**count for count in range(min(least, rounds), rounds + 1))
        elif str(operation) == "BRANCH":
            ways *= sum(map(_ways, given[1]))
        elif isinstance(given, tuple):
            for part in given:
                ways *= _ways(part) if isinstance(part, type(parsed)) else 1
        ways = min(ways, MOST_WAYS + 1)
    return ways
