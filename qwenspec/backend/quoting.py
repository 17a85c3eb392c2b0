"""Text from a spec or its path, made safe for the places of generated code where it may stand.

Nothing else of a user's text is written into a Python file; MANIFEST.json has it as JSON.
"""

from __future__ import annotations

from qwenspec.diagnostics import printable


def comment(text: str) -> str:
    """For a comment: one line of what can be seen, other characters as `\\n`."""
    return printable(text)


def inside_quotes(text: str) -> str:
    """For a literal in double quotes, or in three of them: what Python reads there is `text`."""
    # After a double quote, repr chooses single ones for the outside, and escapes all else that has to be.
    return repr('"' + text)[2:-1].replace('"', '\\"')
