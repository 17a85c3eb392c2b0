"""The folder of a package: what of it is the package's, and putting another version in its place.

MANIFEST.json lists the package's files with their hashes; what it does not list is somebody else's, and stays. A new
version is built beside the folder and swapped with it, so that whoever looks finds the old one or the new one, whatever
ends this process and when. What that leaves beside the folder, the next write removes. Symbolic links are not followed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from qwenspec.backend.registry import MANIFEST
from qwenspec.diagnostics import Diagnostic, SpecError, listed

# What Python keeps in __pycache__ and makes again, half written too; what else is there is somebody's.
COMPILED = "__pycache__"
_CODE = re.compile(r".+\.pyc(\.\d+)?")
PATIENCE = 60.0  # seconds; another process writes for less than one, but anyone may hold the lock
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@dataclass(frozen=True)
class Present:
    """What is in a package's folder, by path inside it.

    files: contents of the regular files that the manifest lists or that were asked for, and of the manifest
    own: of these, those that the manifest lists, and itself
    edited: of these, those that are not as they were written
    others: what somebody else put there; folders where they are empty"""

    files: dict[str, bytes] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    edited: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """What writing a package met. `kept`: files of somebody else. `replaced`: the package's, edited since. `removed`:
    the package's, which this version does not have."""

    kept: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def hashes(files: Mapping[str, str]) -> list[dict[str, str]]:
    """The files of a package as its manifest lists them."""
    return [{"file": name, "sha256": hashlib.sha256(text.encode()).hexdigest()} for name, text in sorted(files.items())]


def read(package: Path, wanted: Mapping[str, str]) -> Present:
    """Looks, and changes nothing. Raises SpecError for a symbolic link (`not-followed`) and for what is no folder
    (`not-generated`)."""
    if package.is_symlink():
        raise _link(package)
    if not package.exists():
        return Present()
    if not package.is_dir():
        raise SpecError([Diagnostic("not-generated", f"{package} is no folder", hint="choose another one with --out")])
    found = sorted(_entries(package))
    written = _listed(package / MANIFEST)
    files: dict[str, bytes] = {}
    for name in found:
        if name in wanted or name in written or name == MANIFEST:
            content = _content(package / name)
            if content is not None:
                files[name] = content
    own = {name for name in files if name in written or (name == MANIFEST and written)}
    edited = {name for name in own - {MANIFEST} if hashlib.sha256(files[name]).hexdigest() != written[name]}
    others = tuple(name for name in found if name not in own)
    return Present(files, frozenset(own), frozenset(edited), others)


def write(package: Path, files: Mapping[str, str]) -> Written:
    """Make the folder hold this version, all of it or nothing; a version that is there already is not touched.

    Several processes wait for one another, at most PATIENCE. Nothing is flushed to the disk: after a loss of power,
    generate again. Raises SpecError when something else is in the way, or where one cannot write."""
    out = package.parent
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            _repair(package)
            present = read(package, files)
            new = {name: text.encode() for name, text in files.items()}
            stale = present.own - new.keys()
            kept = (*(name for name in present.others if name not in new), *sorted(stale & present.edited))
            _refuse_obstacles(package, present, files, kept)
            if stale <= present.edited and all(present.files.get(name) == text for name, text in new.items()):
                return Written(kept)
            _replace(package, new, present, kept)
            return Written(kept, tuple(sorted(present.edited & new.keys())), tuple(sorted(stale - present.edited)))
    except OSError as error:
        problem = f"{package}: {error.strerror or error}"
        raise SpecError([Diagnostic("cannot-write", problem, hint="choose another folder with --out")]) from error


# ------------------------------------------------------------------------------------------------------- looking


def _entries(package: Path) -> Iterator[str]:
    """Everything that is not a folder, and the empty ones."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(package, onerror=fail):
        compiled = os.path.basename(folder) == COMPILED
        if compiled:
            files = [name for name in files if not _CODE.fullmatch(name)]
        for name in (*folders, *files):
            if os.path.islink(os.path.join(folder, name)):
                raise _link(Path(folder, name))
        inside = Path(folder).relative_to(package)
        yield from ((inside / name).as_posix() for name in files)
        if not folders and not files and not compiled and Path(folder) != package:
            yield inside.as_posix()


def _listed(manifest: Path) -> dict[str, str]:
    """The package's files and their hashes; none where there is no manifest, or not one of a package's."""
    content = _content(manifest) if os.path.lexists(manifest) else None
    try:
        entries = json.loads(content or b"{}")["files"]
        return {str(entry["file"]): str(entry["sha256"]) for entry in entries}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _content(file: Path) -> bytes | None:
    """None for what is no regular file; opening a fifo would wait for a writer."""
    if not stat.S_ISREG(os.lstat(file).st_mode):
        return None
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as opened:
        return opened.read()


def _refuse_obstacles(package: Path, present: Present, files: Mapping[str, str], kept: tuple[str, ...]) -> None:
    """What is in the place of a file, and not the package's nor the same; and what Python would import instead."""
    if not present.own and any(name.endswith(".py") or name == MANIFEST for name in present.others):
        message = f"{package} holds files that this qwenspec did not write ({MANIFEST} lists none)"
        hint = "remove it, or choose another folder with --out"
        raise SpecError([Diagnostic("not-generated", message, hint=hint)])
    others = {name for name in present.others if present.files.get(name) != files.get(name, "").encode()}
    above = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    inside = {str(parent) for name in present.others for parent in PurePosixPath(name).parents}
    if places := sorted((others & (files.keys() | above)) | (inside & files.keys())):
        message = f"in {package}, {listed(places, 'and')} is in the place of a generated file, and not one"
    elif hiding := sorted(_hiding(kept, files)):
        message = f"in {package}, {listed(hiding, 'and')} is what Python would import in place of a generated file"
    else:
        return
    hint = "move it away, or choose another folder with --out"
    raise SpecError([Diagnostic("not-generated", message, hint=hint)])


def _hiding(kept: Iterable[str], files: Mapping[str, str]) -> Iterator[str]:
    """Packages and compiled modules, which Python takes before a `.py` file of the same name."""
    modules = {PurePosixPath(name).with_suffix("") for name in files if name.endswith(".py")}
    for name in kept:
        path = PurePosixPath(name)
        module = path.with_name(path.name.partition(".")[0] or path.name)
        compiled = path.suffix in (".so", ".pyd")
        package = module.name == "__init__" and (compiled or path.suffix in (".py", ".pyc"))
        if (compiled and module in modules) or (package and path.parent in modules):
            yield name


def _link(path: Path) -> SpecError:
    message = f"{path} is a symbolic link, and packages are not written through links"
    hint = "remove it, or choose another folder with --out"
    return SpecError([Diagnostic("not-followed", message, hint=hint)])


# ------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """No other process writes packages there; the lock is on the folder itself, and ends with its holder."""
    handle = os.open(out, os.O_RDONLY)
    try:
        _lock(handle, out)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, out: Path) -> None:
    with contextlib.suppress(ImportError):  # a system without locks
        import fcntl

        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    hint = "wait until it is done, or choose another folder with --out"
                    message = f"{out}: another process writes packages there"
                    raise SpecError([Diagnostic("cannot-write", message, hint=hint)]) from None
                time.sleep(0.01)
            except OSError:  # a network's file system without locks
                return


def _replace(package: Path, new: Mapping[str, bytes], present: Present, kept: tuple[str, ...]) -> None:
    beside = _beside(package, "new")
    beside.mkdir()
    try:
        _build(beside, package, new, present, kept)
        if not package.exists():
            os.rename(beside, package)
        elif not _exchanged(beside, package):
            _move_away(package)
            os.rename(beside, package)
    finally:
        with contextlib.suppress(OSError, SpecError):  # else the next write does
            _repair(package)


def _build(beside: Path, package: Path, new: Mapping[str, bytes], present: Present, kept: tuple[str, ...]) -> None:
    """The new version, with what has not changed and what is somebody else's as links to the same files."""
    for name, content in new.items():
        place = beside / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if present.files.get(name) != content or not _linked(package / name, place):
            place.write_bytes(content)
    for name in kept:
        place = beside / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (package / name).is_dir():
            place.mkdir(exist_ok=True)
        elif not _linked(package / name, place):
            shutil.copy2(package / name, place, follow_symlinks=False)
    for folder in (beside, *(path for path in beside.rglob("*") if path.is_dir())):
        before = package / folder.relative_to(beside)
        if before.is_dir():
            shutil.copymode(before, folder)


def _linked(file: Path, place: Path) -> bool:
    try:
        os.link(file, place, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links
        return False
    return True


def _move_away(package: Path) -> None:
    """A container's file system does not rename a folder of its image: it is copied, and then goes, its manifest first,
    without which nobody takes what is left for a package."""
    try:
        os.rename(package, _beside(package, "old"))
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        part = _beside(package, "new")
        shutil.copytree(package, part)
        copied = part.with_suffix(".copied")
        os.rename(part, copied)
        (package / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(package)
        os.rename(copied, copied.with_suffix(".old"))


def _exchanged(a: Path, b: Path) -> bool:
    """Two folders change places at once; False where the system cannot do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number))


def _beside(package: Path, ending: str) -> Path:
    """A name that no other process uses. What has it may be removed (`new`), is the package while there is none
    (`old`), or holds all that the package held before some of it was removed (`copied`)."""
    return package.with_name(f".{package.name}.{secrets.token_hex(8)}.{ending}")


def _repair(package: Path) -> None:
    """Removes what a process left that was ended while it wrote; what it had moved away comes back."""
    if package.is_symlink() or package.is_file():
        return  # `read` tells it
    name = re.compile(rf"\.{re.escape(package.name)}\.[0-9a-f]{{16}}\.(new|old|copied)")
    left = [path for path in package.parent.iterdir() if name.fullmatch(path.name) and not path.is_symlink()]
    for path in left:
        if path.suffix != ".new" and not package.exists():
            os.rename(path, package)
            continue
        if path.suffix == ".copied":
            list(_entries(package))  # no links, which the copy would follow
            shutil.copytree(path, package, dirs_exist_ok=True)
        junk = path.with_suffix(".new")
        os.rename(path, junk)
        shutil.rmtree(junk, ignore_errors=True)
