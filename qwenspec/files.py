"""Files that commands write: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from qwenspec.diagnostics import Diagnostic, SpecError


def write_whole(file: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place and rename it, so that whatever stops it leaves what was there.

    content: text (UTF-8), bytes, or a function that writes them into an open file.
    Raises SpecError (`cannot-write`) where it cannot be written, and for a symbolic link, which is not followed.
    """
    try:
        if file.is_symlink():
            raise SpecError([Diagnostic("cannot-write", f"{file} is a symbolic link, which is not written through")])
        if file.exists() and not file.is_file():
            raise SpecError([Diagnostic("cannot-write", f"{file} is no regular file")])
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{file.name[:40]}.", suffix=".new", dir=file.parent)
        try:
            with open(handle, "wb") as stream:
                if callable(content):
                    content(stream)
                else:
                    stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fchmod(handle, _mode(file))
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SpecError([Diagnostic("cannot-write", f"{file}: {error.strerror or error}")]) from error


def _mode(file: Path) -> int:
    """That of the file which is there, else what a new one gets."""
    if file.exists():
        return file.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
