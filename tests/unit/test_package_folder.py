"""What `gen` does to a folder: the old package or the new one, and nothing of anybody else's."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_runs import TINY, call

from qwenspec.backend import folder
from qwenspec.backend.emit import dump_manifest
from qwenspec.backend.folder import write
from qwenspec.backend.registry import MANIFEST
from qwenspec.diagnostics import SpecError

Files = dict[str, str]


def version(**texts: str) -> Files:
    """A package of these files, `kernels__b` for kernels/b.py."""
    files = {f"{name.replace('__', '/')}.py": text for name, text in texts.items()}
    return files | {MANIFEST: dump_manifest({"backend": "none", "files": folder.hashes(files)})}


OLD = version(a="a = 1\n", same="s = 1\n", gone="g = 1\n", kernels__b="b = 1\n", dropped__c="c = 1\n")
NEW = version(a="a = 2\n", same="s = 1\n", new="n = 2\n", kernels__b="b = 2\n", kernels__d="d = 2\n")
MINE = {"my_server.py": "x = 1\n", "kernels/mine.py": "y = 1\n", "notes/todo.txt": "", "dropped/data.bin": "z"}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The old version, with files of somebody else."""
    place = tmp_path / "out" / "tiny_triton"
    write(place, OLD)
    add(place, MINE)
    (place / "empty").mkdir()
    return place


def add(place: Path, files: Files) -> None:
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)


def there(place: Path) -> Files:
    return {str(path.relative_to(place)): path.read_text() for path in place.rglob("*") if path.is_file()}


def alone(package: Path) -> bool:
    return list(package.parent.iterdir()) == [package]


# ----------------------------------------------------------------------------------------------- what is somebody's


def test_others_files_are_kept_and_old_ones_of_its_own_removed(package: Path) -> None:
    package.chmod(0o750)
    met = write(package, NEW)
    assert there(package) == NEW | MINE
    assert sorted(met.kept) == sorted([*MINE, "empty"])
    assert (met.replaced, met.removed) == ((), ("dropped/c.py", "gone.py"))
    assert (package / "empty").is_dir()
    assert stat.S_IMODE(package.stat().st_mode) == 0o750
    assert alone(package)


def test_what_has_not_changed_is_not_touched(package: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (package, package / "same.py", package / "my_server.py")}
    write(package, OLD)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    write(package, NEW)
    assert (package / "same.py").stat().st_mtime_ns == before[package / "same.py"]


def test_edits_of_a_generated_file_are_replaced_and_told(package: Path) -> None:
    (package / "a.py").write_text("a = 7\n")
    (package / "gone.py").write_text("g = 7  # worth keeping\n")
    met = write(package, NEW)
    assert met.replaced == ("a.py",)
    assert "gone.py" in met.kept
    assert there(package) == NEW | MINE | {"gone.py": "g = 7  # worth keeping\n"}
    assert write(package, NEW).replaced == ()


def test_what_python_compiled_is_not_somebodys(package: Path) -> None:
    add(package, {"__pycache__/a.cpython-311.pyc": "", "kernels/__pycache__/b.cpython-311.pyc.1234": ""})
    assert sorted(write(package, NEW).kept) == sorted([*MINE, "empty"])
    assert there(package) == NEW | MINE


def test_what_somebody_put_beside_what_python_compiled_is_kept(package: Path) -> None:
    mine = {"__pycache__/notes.txt": "mine", "kernels/__pycache__/a/b.py": "mine"}
    add(package, mine | {"__pycache__/a.cpython-311.pyc": ""})
    assert set(mine) <= set(write(package, NEW).kept)
    assert there(package) == NEW | MINE | mine


@pytest.mark.parametrize("name", ["new.py", "kernels/d.py", "new.py/x", "kernels"])
def test_what_is_in_the_place_of_a_new_file_stays_and_is_told(name: str, tmp_path: Path) -> None:
    package = tmp_path / "tiny"
    write(package, version(a="a = 1\n"))
    add(package, {name: "mine"})
    before = there(package)
    with pytest.raises(SpecError, match=r"in the place of a generated file"):
        write(package, NEW)
    assert there(package) == before
    assert alone(package)


HIDING = ["new/__init__.py", "new/__init__.abi3.so", "new.so", "new.cpython-311-x86_64-linux-gnu.so", "kernels/d.pyd"]


@pytest.mark.parametrize("name", HIDING)
def test_what_python_would_import_instead_is_told(name: str, package: Path) -> None:
    add(package, {name: "mine"})
    with pytest.raises(SpecError, match=r"is what Python would import in place of a generated file") as got:
        write(package, NEW)
    assert f"`{name}`" in str(got.value)
    assert there(package) == OLD | MINE | {name: "mine"}


def test_an_edited_file_of_an_older_version_does_not_hide_a_module(tmp_path: Path) -> None:
    package = tmp_path / "tiny"
    old = {"new/__init__.py": "n = 1\n"}
    write(package, old | {MANIFEST: dump_manifest({"backend": "none", "files": folder.hashes(old)})})
    (package / "new" / "__init__.py").write_text("n = 7\n")
    with pytest.raises(SpecError, match=r"`new/__init__\.py` is what Python would import"):
        write(package, NEW)


def test_what_python_would_not_import_instead_is_kept(package: Path) -> None:
    names = ["new/notes.py", "new/data.so", "kernels/new.so", "new.pyc", "renewed.so", "docs/__init__.py", ".so"]
    add(package, dict.fromkeys(names, "mine"))
    write(package, NEW)
    assert there(package) == NEW | MINE | dict.fromkeys(names, "mine")


def test_the_same_file_is_not_in_the_way(package: Path) -> None:
    add(package, {"new.py": NEW["new.py"]})
    write(package, NEW)
    assert there(package) == NEW | MINE


@pytest.mark.parametrize("manifest", [None, "{}", "[]", "{", "[" * 100_000, '{"files": [3]}', '{"files": {"a.py": 1}}'])
def test_a_folder_that_it_did_not_write_stays(manifest: str | None, tmp_path: Path) -> None:
    package = tmp_path / "tiny"
    add(package, {"a.py": "mine"} | ({} if manifest is None else {MANIFEST: manifest}))
    before = there(package)
    with pytest.raises(SpecError) as caught:
        write(package, NEW)
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["not-generated"]
    assert there(package) == before


def test_a_file_in_the_place_of_the_folder_stays_and_is_told(tmp_path: Path) -> None:
    package = tmp_path / "tiny"
    package.write_text("mine")
    for act in (write, folder.read):
        with pytest.raises(SpecError, match=r"tiny is no folder"):
            act(package, NEW)
    assert package.read_text() == "mine"


def test_files_that_nobody_can_read_as_text_are_carried_along(package: Path) -> None:
    (package / "latin.py").write_bytes(b"# \xe9\n")
    os.mkfifo(package / "x.py")
    met = write(package, NEW)
    assert {"latin.py", "x.py"} <= {*met.kept}
    assert (package / "latin.py").read_bytes() == b"# \xe9\n"
    assert stat.S_ISFIFO((package / "x.py").lstat().st_mode)


def test_a_fifo_in_the_place_of_a_file_is_told(package: Path) -> None:
    (package / "a.py").unlink()
    os.mkfifo(package / "a.py")
    with pytest.raises(SpecError, match=r"`a\.py` is in the place of a generated file"):
        write(package, NEW)


# ------------------------------------------------------------------------------------------------------------- links


def link(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("place", ["", "a.py", "kernels", "kernels/b.py", MANIFEST, "other", "notes/x", "__pycache__"])
def test_a_link_is_not_followed(place: str, package: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(package, elsewhere)
    before = there(elsewhere)
    link(package / place, elsewhere / place if (elsewhere / place).exists() else elsewhere / "a.py")
    for act in (write, folder.read):
        with pytest.raises(SpecError, match=r"is a symbolic link"):
            act(package, NEW)
    assert there(elsewhere) == before
    assert (package / place).is_symlink()


def test_nothing_is_written_through_a_link_beside(package: Path, tmp_path: Path) -> None:
    """Whatever names somebody planted for files on their way."""
    victim = tmp_path / "victim"
    victim.write_text("important\n")
    beside = [package.parent / f".tiny_triton.{'0' * 16}.{ending}" for ending in ("new", "old")]
    for path in (*beside, package.parent / ".tiny_triton.new"):
        path.symlink_to(victim)
    write(package, NEW)
    assert victim.read_text() == "important\n"
    assert all(path.is_symlink() for path in beside)


# ------------------------------------------------------------------------------------------------ killed and failing

CALLS = ("link", "mkdir", "open", "rename", "unlink", "rmdir", "chmod", "scandir")


@contextmanager
def stopped_at(number: int, stop: Callable[[], None]) -> Iterator[list[str]]:
    """The file system's calls, of which one does not return as it should."""
    made: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == number:
                stop()
            return call(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        patch.setattr(folder, "_exchanged", counted("exchange", folder._exchanged))
        patch.setattr(Path, "write_bytes", counted("write", Path.write_bytes))
        yield made


def full() -> None:
    raise OSError(28, "No space left on device")


def killed_at(number: int, package: Path) -> bool:
    """In a process of its own; False when it was done before."""
    child = os.fork()
    if child == 0:
        try:
            with stopped_at(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                write(package, NEW)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0


@pytest.fixture(params=["exchange", "two renames", "copies"])
def swapping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As this system does, or as one that cannot exchange two folders at once, or not even rename the old one."""
    rename = os.rename

    def within_an_image(a: Path, b: Path) -> None:
        if a.name == "tiny":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(a, b)

    if request.param != "exchange":
        monkeypatch.setattr(folder, "_exchanged", lambda a, b: False)
    if request.param == "copies":
        monkeypatch.setattr(os, "rename", within_an_image)
    return str(request.param)


def test_a_kill_at_any_call_leaves_one_version_and_the_next_write_repairs(swapping: str, tmp_path: Path) -> None:
    seen = set()
    for number in range(1, 1000):
        package = tmp_path / str(number) / "tiny"
        write(package, OLD)
        add(package, MINE)
        done = not killed_at(number, package)
        found = there(package) if package.exists() else {}
        state = "old" if found == OLD | MINE else "new" if found == NEW | MINE else "none" if not found else "rest"
        assert state != "rest" or MANIFEST not in found
        seen.add(state)
        write(package, NEW)
        assert there(package) == NEW | MINE
        assert alone(package)
        shutil.rmtree(package.parent)
        if done:
            break
    assert done
    assert number > 30
    others = {"exchange": set(), "two renames": {"none"}, "copies": {"none", "rest"}}
    assert seen == {"old", "new"} | others[swapping]


def test_an_error_at_any_call_leaves_one_version_and_no_rest(swapping: str, tmp_path: Path) -> None:
    for number in range(1, 1000):
        package = tmp_path / str(number) / "tiny"
        write(package, OLD)
        add(package, MINE)
        with stopped_at(number, full) as made:
            error = failed(package)
        if error:
            assert [diagnostic.code for diagnostic in error.diagnostics] == ["cannot-write"]
            assert "No space left on device" in str(error)
        assert there(package) == (OLD if error else NEW) | MINE, made[-1]
        write(package, NEW)
        assert there(package) == NEW | MINE
        assert alone(package)
        shutil.rmtree(package.parent)
        if len(made) < number:
            break
    assert number > 30


def failed(package: Path) -> SpecError | None:
    try:
        write(package, NEW)
    except SpecError as error:
        return error
    return None


@pytest.mark.parametrize("mine", [{"notes.txt": "n"}, {}])
def test_what_was_there_without_a_package_outlives_a_kill(mine: Files, swapping: str, tmp_path: Path) -> None:
    for number in range(1, 1000):
        package = tmp_path / str(number) / "tiny"
        package.mkdir(parents=True)
        add(package, mine)
        done = not killed_at(number, package)
        write(package, NEW)
        assert there(package) == NEW | mine
        assert alone(package)
        if done:
            break
    assert done


@pytest.mark.parametrize("ending", ["old", "copied"])
def test_what_was_moved_away_is_not_put_where_a_link_leads(ending: str, package: Path, tmp_path: Path) -> None:
    away = package.rename(package.with_name(f".tiny_triton.{'0' * 16}.{ending}"))
    package.mkdir()
    inside = package if ending == "old" else package / "kernels"
    link(inside, tmp_path)
    with pytest.raises(SpecError, match=r"is a symbolic link"):
        write(package, NEW)
    assert there(away) == OLD | MINE
    assert not (tmp_path / "b.py").exists()


def test_what_was_added_to_the_rest_of_a_package_stays(package: Path) -> None:
    package.rename(package.with_name(f".tiny_triton.{'0' * 16}.copied"))
    add(package, {"a.py": OLD["a.py"], "later.txt": "l"})
    write(package, NEW)
    assert there(package) == NEW | MINE | {"later.txt": "l"}
    assert alone(package)


def test_writers_wait_for_one_another(tmp_path: Path) -> None:
    package = tmp_path / "tiny"
    children = []
    for child in range(3):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                for turn in range(40):
                    write(package, (OLD, NEW)[(child + turn) % 2])
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert there(package) in (OLD, NEW)
    assert alone(package)


def test_a_writer_waits_until_another_is_done(package: Path) -> None:
    with folder._alone(package.parent):
        waiting = threading.Thread(target=write, args=(package, NEW))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        assert there(package) == OLD | MINE
    waiting.join()
    assert there(package) == NEW | MINE


def test_a_lock_that_somebody_keeps_is_told(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PATIENCE", 0.05)
    with folder._alone(package.parent), pytest.raises(SpecError, match=r"another process writes packages there") as got:
        write(package, NEW)
    assert [diagnostic.code for diagnostic in got.value.diagnostics] == ["cannot-write"]
    assert there(package) == OLD | MINE


# --------------------------------------------------------------------------------------------------------- `gen`


def test_gen_says_what_it_kept_and_replaced(tmp_path: Path) -> None:
    spec, out = tmp_path / "spec.yaml", tmp_path / "out"
    spec.write_text(TINY)
    package = Path(json.loads(call("gen", spec, "-o", out, "--json").stdout)[0]["package"])
    listed = {entry["file"] for entry in json.loads((package / MANIFEST).read_text())["files"]}
    assert listed == {str(path.relative_to(package)) for path in package.rglob("*.py")}
    add(package, {"my_server.py": "x=1\n"})
    (package / "config.py").write_text("edited = True\n")
    old = "old = True\n"
    add(package, {"older.py": old})
    manifest = json.loads((package / MANIFEST).read_text())
    manifest["files"] += folder.hashes({"older.py": old})
    (package / MANIFEST).write_text(json.dumps(manifest))
    assert "config.py" in call("gen", spec, "-o", out, "--check").stdout
    again = call("gen", spec, "-o", out)
    assert again.exit_code == 0
    assert f"{package}: kept what qwenspec did not write: my_server.py\n" in again.stderr
    assert f"{package}: replaced what had been edited: config.py\n" in again.stderr
    assert f"{package}: removed what this version does not have: older.py\n" in again.stderr
    assert "my_server.py" not in again.stdout
    assert (package / "my_server.py").read_text() == "x=1\n"
    same = call("gen", spec, "-o", out, "--check")
    assert (same.exit_code, same.stdout, same.stderr) == (0, "", "1 package up to date\n")
    assert "edited" not in call("gen", spec, "-o", out).stderr


@pytest.mark.parametrize(
    "content", [b"- \xff", b"[" * 500_000, b"- {spec: 3}", b"- !!python/name:os.system", b"\0", b""]
)
def test_a_manifest_of_packages_that_cannot_be_read_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.yaml").write_bytes(content)
    told = call("gen", "--all", "-o", tmp_path)
    assert told.exit_code == 2
    assert "manifest.yaml" in told.stderr
    assert "internal" not in told.stderr
