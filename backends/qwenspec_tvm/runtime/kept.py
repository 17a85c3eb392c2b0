"""The folder in which compiled code is kept. What is loaded from it runs: nobody else may have put it there."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$QWENSPEC_CACHE, or qwenspec/ in $XDG_CACHE_HOME or ~/.cache; a temporary one for users without a home."""
    if folder := os.environ.get("QWENSPEC_CACHE"):
        return Path(folder)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "qwenspec"
    if home := os.environ.get("HOME") or _home():
        return Path(home) / ".cache" / "qwenspec"
    return Path(tempfile.gettempdir()) / f"qwenspec-{os.geteuid()}"


def make_private(folder: Path) -> None:
    """The folder, for this user alone if it is not there yet. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)  # whatever the umask says


def doubt(place: Path) -> str:
    """Why somebody else could have written this file, or files in this folder; empty where nobody can have."""
    try:
        found = place.lstat()
    except OSError:
        return ""  # it is not there
    if stat.S_ISLNK(found.st_mode):
        return f"{place} is a symbolic link"
    if not hasattr(os, "geteuid"):
        return ""
    if found.st_uid not in (os.geteuid(), 0):
        return f"{place} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to {place} (chmod go-w makes it yours)"
    return ""


def _home() -> str:
    """The user's, as the system knows it, or nothing."""
    try:
        import pwd

        return pwd.getpwuid(os.geteuid()).pw_dir
    except (ImportError, KeyError):
        return ""
