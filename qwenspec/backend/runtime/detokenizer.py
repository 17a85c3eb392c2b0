"""From token ids to text, as they come: whole characters, until a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from .text import Text, TextError, unicode


class TextStream:
    """The text of tokens that come one by one, until one of the texts `stop`."""

    def __init__(self, text: Text, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str):
            raise TextError(f"stop is several texts, as [{stop!r}]")
        if not all(stop):
            raise TextError("a stop string is empty")
        self._text = text
        self._stop = [unicode(end) for end in stop]
        self._ids: list[int] = []
        self._begin = self._read = 0  # ids from _begin on are decoded again; those up to _read are in the text
        self._held = ""  # decoded, and not taken yet
        self._stopped = False

    def add(self, id: int) -> bool:
        """One more token; whether its text completes a stop."""
        self._ids.append(id)
        piece = self._decode()
        if not piece.endswith("\ufffd"):  # else bytes of the last character may still come
            self._begin, self._read = self._read, len(self._ids)
            self._append(piece)
        return self._stopped

    def take(self, last: bool) -> str:
        """Text that is certain, and was not taken before: what may be the beginning of a stop waits, unless `last`."""
        if last and not self._stopped:
            self._append(self._decode())
        kept = 0 if last or self._stopped else self._beginning()
        taken, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return taken

    def _decode(self) -> str:
        """What the ids add to the text that are not in it."""
        before, after = (self._text.decode(self._ids[self._begin : end]) for end in (self._read, None))
        return after[len(before) :]

    def _append(self, piece: str) -> None:
        """Where a stop is complete, drop it and what follows: the one that is complete first."""
        self._held += piece
        found = [(at + len(end), at) for end in self._stop if (at := self._held.find(end)) >= 0]
        if found:
            self._held = self._held[: min(found)[1]]
            self._stopped = True

    def _beginning(self) -> int:
        """Characters at the end that a stop may begin with."""
        longest = max((len(end) - 1 for end in self._stop), default=0)
        ends = (n for n in range(min(longest, len(self._held)), 0, -1))
        return next((n for n in ends if any(end.startswith(self._held[-n:]) for end in self._stop)), 0)
