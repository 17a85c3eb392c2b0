"""Regular expressions of config.json, which name modules by the beginning of their names, as `re.match` does."""

from __future__ import annotations

import re

from qwenspec.hf.config import Config


def compiled(config: Config, key: str, expression: str, after: str = "") -> re.Pattern[str] | None:
    """An expression written under `key`, and what must match after it; None after reporting that it is none."""
    try:
        return re.compile(f"(?:{expression}){after}" if after else expression)
    except (re.error, RecursionError, OverflowError) as error:
        message = f"`{key}` has {expression!r}, which is no regular expression: {error}"
        config.error("wrong-value", message, key)
        return None
