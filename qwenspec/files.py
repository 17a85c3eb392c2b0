"""Files that commands write: whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from qwenspec.diagnostics import Diagnostic, SpecError


def write_whole(file: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place and rename it, so that whatever stops it leaves what was there.

    content: text (UTF-8), bytes, or a function that writes them into an open file.
    Raises SpecError (`cannot-write`) where it cannot be written, and what `check_place` raises.
    """
    check_place(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name[:40]}.{secrets.token_hex(8)}.new")
        # As any new file: what the user's umask leaves of the permissions, and never one that is there.
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with open(handle, "wb") as stream:
                if file.exists():
                    os.fchmod(handle, file.stat().st_mode & 0o777)
                if callable(content):
                    content(stream)
                else:
                    stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(handle)  # the name must not reach the disk before what it names
            os.replace(beside, file)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _refused(f"{file}: {error.strerror or error}") from error


def check_place(file: Path) -> None:
    """For before the work whose result goes there. Raises SpecError (`cannot-write`) for a symbolic link, which is not
    followed, for what is no regular file, and for a folder where this user may not write."""
    try:
        if file.is_symlink():
            raise _refused(f"{file} is a symbolic link, which is not written through", "name the file itself")
        if file.exists() and not file.is_file():
            raise _refused(f"{file} is no regular file", "name another; what is printed can be redirected anywhere")
        folder = next(parent for parent in file.absolute().parents if parent.exists())
    except OSError as error:
        raise _refused(f"{file}: {error.strerror or error}") from error
    if not folder.is_dir():
        raise _refused(f"{folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refused(f"nothing may be written into the folder {folder}")


def _refused(problem: str, hint: str = "") -> SpecError:
    return SpecError([Diagnostic("cannot-write", problem, hint=hint)])
