"""Targets, compiled libraries, their cache, and what is refused before it can run."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tvm

from hf_parity.oracle import QWEN3, Oracle, some_ids, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package

FLAGS = {"pni", "ssse3", "sse41", "sse42", "popcnt", "cx16", "avx"}  # of a CPU without AVX2


@pytest.fixture(scope="module", autouse=True)
def _libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENSPEC_CACHE", str(tmp_path_factory.getbasetemp() / "libraries"))
        yield


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(tiny_spec(QWEN3, {"vocab_size": 300}))


@pytest.fixture(scope="module")
def package(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emit(oracle.spec, "tvm", tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def module(package: Path) -> ModuleType:
    return import_package(package)


@pytest.fixture(scope="module")
def weights(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.save(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def targets(module: ModuleType) -> Iterator[ModuleType]:
    found = part(module, "targets")
    yield found
    found.host_target.cache_clear()


@pytest.fixture
def library(module: ModuleType) -> ModuleType:
    return part(module, "library")


@pytest.fixture(scope="module")
def compiled(module: ModuleType) -> tuple[Any, dict[str, Any]]:
    """This machine's executable in float32 and its metadata: the one thing that these tests compile."""
    found: tuple[Any, dict[str, Any]] = part(module, "library").compile_library(
        part(module, "targets").find_target("cpu"), "float32"
    )
    return found


@pytest.fixture(scope="module")
def built(module: ModuleType, compiled: tuple[Any, dict[str, Any]]) -> Path:
    """Its library, in the cache."""
    library = part(module, "library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "compile_library", lambda *_: compiled)
        library.find_library(part(module, "targets").find_target("cpu"), "float32")
    (path,) = library.cache_folder().glob("tiny-float32-llvm-*.so")
    return Path(path)


def part(module: ModuleType, name: str) -> ModuleType:
    return importlib.import_module(f"{module.__name__}.{name}")


def no_compiler(*_: object) -> None:
    pytest.fail("something was compiled")


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    cache = model.create_paged_kv_cache(1, len(ids), len(ids))
    cache.add_sequence(0)
    cache.begin_forward([0], [len(ids)])
    found: np.ndarray = model.batch_verify(model.embed(ids), cache).numpy()[0]
    return found


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ('{"kind": "llvm", "mtriple": "xx-yy"}', "LLVM knows no machine 'xx-yy': a triple is like '"),
        (
            '{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mattr": ["+zzz", "+avx2"]}',
            "no feature zzz of x86_64-linux",
        ),
        (
            '{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["-avx2"]}',
            "no feature avx2 of aarch64-linux-gnu",
        ),
        ("cuda:sm_1", "'sm_1' is no architecture of a GPU"),
        ('{"kind": "cuda", "arch": "fermi"}', "'fermi' is no architecture of a GPU"),
    ],
)
def test_machines_that_are_not_are_refused(name: str, message: str, targets: ModuleType) -> None:
    """LLVM itself would end the process, or go on without what it does not know."""
    with pytest.raises(targets.BuildError, match=message):
        targets.find_target(name)


def test_machines_that_are(targets: ModuleType) -> None:
    for triple in ("x86_64-linux-gnu", "aarch64-linux-gnu", "arm64-apple-macos", "riscv64-linux-gnu", "i686-linux-gnu"):
        assert targets.find_target(json.dumps({"kind": "llvm", "mtriple": triple})).kind.name == "llvm"
    mattr = ["+avx2", "-avx512f"]
    found = targets.find_target(json.dumps({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mattr": mattr}))
    assert list(found.attrs["mattr"]) == mattr
    for arch in ("sm_80", "sm_90a", "sm_120"):
        assert targets.find_target(f"cuda:{arch}").attrs["arch"] == arch


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "vulkan", "{", '{"kind": "llvm", "nope": 1}', '{"mcpu": "znver3"}'])
def test_an_unknown_target_is_told_what_is_known(targets: ModuleType, name: str) -> None:
    with pytest.raises(targets.BuildError, match=r'known are "cpu", "cuda", .*"cuda:sm_90".*target JSON'):
        targets.find_target(name)


def test_an_unknown_cpu_is_refused(targets: ModuleType) -> None:
    with pytest.raises(targets.BuildError, match=r"LLVM knows no CPU 'pentium-9' of x86_64.*this machine's is '"):
        targets.find_target('{"kind": "llvm", "mcpu": "pentium-9", "mtriple": "x86_64-linux-gnu"}')


def test_targets_are_found_by_name(targets: ModuleType) -> None:
    assert targets.find_target("llvm") is targets.find_target("cpu") is targets.host_target()
    assert targets.find_target("cuda:sm_80").attrs["arch"] == "sm_80"
    assert targets.find_target("nvidia/nvidia-h100").attrs["arch"] == "sm_90a"
    assert targets.find_target('{"kind": "cuda"}').host.kind.name == "llvm"
    assert targets.find_target('{"kind": "llvm", "mcpu": "x86-64-v3"}').attrs["mcpu"] == "x86-64-v3"
    if not tvm.cuda().exist:
        for name in ("cuda", "cuda:1", "cuda:99"):
            for find in (targets.find_target, targets.find_device):
                with pytest.raises(targets.BuildError, match=r"no such GPU .*name the architecture: cuda:sm_90"):
                    find(name)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells what the CPU can do")
def test_the_kernel_decides_what_the_cpu_can_do(targets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine may lack what its CPU's name promises, or have more."""
    if not targets._is_x86(targets.host_target()):
        pytest.skip("its names are those of x86")
    monkeypatch.setattr(targets.codegen, "llvm_get_system_cpu", lambda: "haswell")
    monkeypatch.setattr(targets, "_cpu_flags", lambda: FLAGS | {"gfni"})
    targets.host_target.cache_clear()
    host = targets.host_target()
    assert {"-avx2", "-fma", "-bmi2", "+gfni"} <= set(host.attrs["mattr"])
    assert set(targets.features(host)) == {"sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cx16", "avx", "gfni"}


# ----------------------------------------------------------------------------------------------------------- libraries


def test_a_library_is_compiled_once(
    module: ModuleType, library: ModuleType, built: Path, oracle: Oracle, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "compile_library", no_compiler)
    model = module.Model.load(weights)
    ids = some_ids(oracle.spec, 9)
    expected = oracle.logits(ids)
    assert np.abs(logits(model, ids) - expected).max() < 1e-4 * np.abs(expected).max()
    assert logits(module.Model.load(weights, library=built), ids).shape == expected.shape


def test_a_library_says_what_it_is(module: ModuleType, library: ModuleType, built: Path) -> None:
    metadata = library.read_metadata(built)
    inside = library.read_library(built).open(tvm.cpu())["_metadata"]()
    assert json.loads(inside) == metadata
    assert (metadata["variant"], metadata["dtype"], metadata["tvm"]) == ("tiny", "float32", tvm.__version__)
    assert metadata["target"]["kind"] == "llvm"
    assert metadata["params"][0] == {"name": "embed_tokens.weight", "shape": [300, 48], "dtype": "float32"}
    assert metadata["methods"][0] == "embed"


def test_the_command_line_says_what_it_built(
    module: ModuleType, library: ModuleType, compiled: tuple[Any, dict[str, Any]], tmp_path: Path, monkeypatch, capsys
) -> None:
    file = tmp_path / "new" / "model.so"
    build = part(module, "build")
    monkeypatch.setattr(build, "compile_library", lambda *_: compiled)
    monkeypatch.setattr(sys, "argv", ["build", "--dtype", "float32", "-o", str(file)])
    assert build.main() == 0
    said = capsys.readouterr().out
    assert f"tiny in float32 for llvm {compiled[1]['target']['mcpu']}: {file}, " in said
    assert "functions: embed, prefill, decode, batch_prefill" in said
    assert library.read_library(file).metadata == compiled[1]


def test_the_command_line_starts_without_a_warning(package: Path) -> None:
    command = [sys.executable, "-m", f"{package.name}.build", "--help"]
    done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "cuda:sm_90" in done.stdout


def test_the_command_line_reports_an_error(package: Path, module: ModuleType, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["build", "--device", "abacus", "-o", "x.so"])
    assert part(module, "build").main() == 2
    assert capsys.readouterr().err.startswith("error: 'abacus' is no target")


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 2, "error: there is not enough memory\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device\n"),
    ],
)
def test_the_command_line_ends_in_a_sentence(
    module: ModuleType, capsys, monkeypatch, trouble: BaseException, code: int, said: str
) -> None:
    def fail(*_: object) -> None:
        raise trouble

    build = part(module, "build")
    monkeypatch.setattr(build, "compile_library", fail)
    monkeypatch.setattr(sys, "argv", ["build", "--dtype", "float32", "-o", "x.so"])
    assert build.main() == code
    assert capsys.readouterr().err == said


def test_the_command_line_needs_standard_output(module: ModuleType, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["build", "-o", "x.so"])
    monkeypatch.setattr(sys, "stdout", None)
    assert part(module, "build").main() == 2
    assert capsys.readouterr().err == "error: standard output is closed, and answers go there\n"


def test_the_same_sources_from_another_place_share_a_library(
    oracle: Oracle, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with another banner. With another kernel, none is shared."""
    package = emit(oracle.spec, "tvm", tmp_path)
    config = package / "config.py"
    config.write_text("# another banner\n" + config.read_text())
    library = part(import_package(package), "library")
    target = part(import_package(package), "targets").find_target("cpu")
    same = library.describe(target, "float32")
    assert same == {name: library.read_metadata(built)[name] for name in same}
    (package / "kernels" / "linear.py").write_text("changed = True\n")
    assert library.describe(target, "float32") != same


def test_a_damaged_library_in_the_cache_is_replaced(
    targets: ModuleType, library: ModuleType, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("QWENSPEC_CACHE", str(tmp_path))
    whole = built.read_bytes()
    (tmp_path / built.name).write_bytes(whole[: len(whole) // 2])
    compiled = []

    def compile_library(*_: object) -> tuple[Any, dict[str, Any]]:
        compiled.append(1)
        return Kept(built), library.read_metadata(built)

    monkeypatch.setattr(library, "compile_library", compile_library)
    for _ in range(2):
        assert library.find_library(targets.find_target("cpu"), "float32").metadata["variant"] == "tiny"
    assert len(compiled) == 1
    assert capsys.readouterr().err.count("note: compiling tiny in float32 for llvm") == 1


@pytest.fixture
def find(
    library: ModuleType, targets: ModuleType, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[], Any], list[int]]:
    """Asks for the library of a cache at tmp_path / "cache"; and how often it was compiled."""
    compiled: list[int] = []

    def compile_library(*_: object) -> tuple[Any, dict[str, Any]]:
        compiled.append(1)
        return Kept(built), library.read_metadata(built)

    monkeypatch.setenv("QWENSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "compile_library", compile_library)
    return lambda: library.find_library(targets.find_target("cpu"), "float32"), compiled


def test_a_fifo_in_the_place_of_a_library_is_replaced(
    find: Any, library: ModuleType, built: Path, tmp_path: Path
) -> None:
    ask, compiled = find
    (tmp_path / "cache").mkdir(mode=0o700)
    fifo = tmp_path / "cache" / built.name
    os.mkfifo(fifo)
    with pytest.raises(library.BuildError, match="is no regular file"):
        library.read_library(fifo)
    ask()
    assert compiled == [1]
    assert fifo.read_bytes() == built.read_bytes()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_nobody_else_can_write_to_the_cache(umask: int, find: Any, built: Path, tmp_path: Path) -> None:
    ask, compiled = find
    before = os.umask(umask)
    try:
        ask()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert not stat.S_IMODE((tmp_path / "cache" / built.name).stat().st_mode) & 0o022
    ask()
    assert compiled == [1]


@pytest.mark.parametrize("where", ["folder", "file"])
@pytest.mark.parametrize("why", ["others can write to ", "belongs to another user", "is a symbolic link"])
def test_what_others_may_have_written_is_not_loaded(
    where: str, why: str, find: Any, library: ModuleType, built: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    ask, compiled = find
    ask()
    folder = tmp_path / "cache"
    place = folder if where == "folder" else folder / built.name
    if why == "others can write to ":
        place.chmod(place.stat().st_mode | 0o020)
    elif why == "is a symbolic link":
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    else:
        seen = Path.lstat

        def lstat(path: Path) -> Any:
            found = list(seen(path))
            return os.stat_result([*found[:4], os.geteuid() + 1, *found[5:]]) if path == place else seen(path)

        monkeypatch.setattr(Path, "lstat", lstat)
    read = library.read_library
    monkeypatch.setattr(library, "read_library", lambda path: compiled.append(path) or read(path))
    ask()
    told = capsys.readouterr().err
    assert why in told
    if where == "folder":  # in memory alone
        assert compiled == [1, 1]
        assert "the library is used from memory" in told
    else:  # compiled again into its place, and read from there
        assert compiled == [1, 1, folder / built.name]
        assert "another takes its place" in told


def test_a_library_of_something_else_is_compiled_again(
    find: Any, library: ModuleType, built: Path, tmp_path: Path
) -> None:
    """Sealed as ours, in our own folder; its code has nothing that a virtual machine runs."""
    ask, compiled = find
    (tmp_path / "cache").mkdir(mode=0o700)
    source, other = tmp_path / "other.c", tmp_path / "cache" / built.name
    source.write_text("int nothing;\n")
    subprocess.run([library.cc.get_cc(), "-shared", "-fPIC", "-o", other, source], check=True)
    seal = library._seal(other.read_bytes(), json.dumps(library.read_metadata(built)).encode())
    with other.open("ab") as end:
        end.write(seal)
    assert isinstance(ask().module, Kept)  # the loader has the other one under this name
    assert compiled == [1]
    assert other.read_bytes() == built.read_bytes()  # for the next process


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"QWENSPEC_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"QWENSPEC_CACHE": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/qwenspec"),
        ({"HOME": "/c"}, "/c/.cache/qwenspec"),
        ({"HOME": ""}, "/tmp/x/qwenspec-1234"),
        ({}, "/tmp/x/qwenspec-1234"),
    ],
)
def test_where_the_cache_is(
    environment: dict[str, str], folder: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user without a home has a temporary folder."""
    for name in ("QWENSPEC_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no such user"])
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp/x")
    assert str(part(module, "kept").cache_folder()) == folder


class Kept:
    """Stands for an executable: gives its shared object away without compiling."""

    def __init__(self, built: Path) -> None:
        self.built = built

    def export_library(self, file: str) -> None:
        content = self.built.read_bytes()
        size = int.from_bytes(content[-12:-8], "little")
        Path(file).write_bytes(content[: len(content) - 44 - size])


def test_many_may_build_at_once(library: ModuleType, built: Path, tmp_path: Path) -> None:
    metadata = library.read_metadata(built)
    path = tmp_path / "cache" / "one.so"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: library.write_library(Kept(built), metadata, path), range(16)))
    assert library.read_library(path).metadata == metadata
    assert os.listdir(path.parent) == ["one.so"]


@pytest.mark.parametrize("why", ["no compiler", "a compiler that fails", "no folder"])
def test_what_cannot_be_kept_is_used_from_memory(
    module: ModuleType,
    library: ModuleType,
    targets: ModuleType,
    built: Path,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    executable = object()
    monkeypatch.setattr(library, "compile_library", lambda *_: (executable, {"variant": "tiny"}))
    monkeypatch.setenv("QWENSPEC_CACHE", str(tmp_path / "cache"))
    if why == "no compiler":
        monkeypatch.setattr(library.cc, "get_cc", lambda: None)
        reason = "linking needs a C compiler"
    elif why == "a compiler that fails":
        executable = Failing()
        reason = "cannot link: ld: no"
    else:
        (tmp_path / "cache").write_text("a file")
        reason = "cannot be written: "
    assert library.find_library(targets.find_target("cpu"), "float32").module is executable
    note = capsys.readouterr().err.splitlines()[-1]
    assert note.startswith("note: the library is used from memory, and will be compiled again next time: ")
    assert reason in note


class Failing:
    def export_library(self, file: str) -> None:
        raise RuntimeError("Compilation error:\nld: no")


def test_a_model_runs_from_memory(
    module: ModuleType, compiled: tuple[Any, dict[str, Any]], oracle: Oracle, weights: Path
) -> None:
    """As where there is no C compiler."""
    checkpoint, cpu = part(module, "checkpoint").open_checkpoint(weights), tvm.cpu()
    parameters = part(module, "weights").load_parameters(checkpoint, compiled[1]["params"], cpu)
    model = module.Model(part(module, "library").Library(compiled[1], compiled[0]), parameters, cpu)
    ids = some_ids(oracle.spec, 9)
    expected = oracle.logits(ids)
    assert np.abs(logits(model, ids) - expected).max() < 1e-4 * np.abs(expected).max()


# ------------------------------------------------------------------------------------------------------------- refused


def test_files_that_are_no_libraries(module: ModuleType, weights: Path, built: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.so"
    with pytest.raises(module.BuildError, match=r"model\.so cannot be read: No such file"):
        module.Model.load(weights, library=file)
    whole = built.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for content in (b"", b"text", whole[:-5000], whole[5000:], bytes(flipped), whole + b"\0"):
        file.write_bytes(content)
        with pytest.raises(module.BuildError, match=r"is no library of a qwenspec package, or it is damaged: build it"):
            module.Model.load(weights, library=file)


def resealed(library: ModuleType, built: Path, path: Path, **changes: Any) -> Path:
    """The library, saying other things of itself."""
    library.write_library(Kept(built), library.read_metadata(built) | changes, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "qwen9"}, r"holds qwen9, and this package is tiny"),
        ({"spec_sha256": "0"}, r"another version of this package \(tiny\)"),
        ({"sources_sha256": "0"}, r"another version of this package \(tiny\)"),
        ({"tvm": "0.1"}, r"was built with TVM 0\.1, and .* is installed"),
        (
            {"target": {"kind": "llvm", "mcpu": "future", "features": ["avx9000", "sse3"], "json": ""}},
            r"for a CPU \(future\) with avx9000, and this one has none",
        ),
    ],
)
def test_a_library_for_something_else_is_not_even_loaded(
    module: ModuleType,
    library: ModuleType,
    weights: Path,
    built: Path,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = resealed(library, built, tmp_path / "model.so", **changes)
    monkeypatch.setattr(tvm.runtime, "load_module", lambda _: pytest.fail("loaded"))
    with pytest.raises(module.BuildError, match=f"{message}: build it here, python -m tiny_tvm.build --device cpu"):
        module.Model.load(weights, library=file)


def test_a_library_for_another_cpu_is_refused_on_this_one(
    module: ModuleType, targets: ModuleType, library: ModuleType, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an older CPU than the one that compiled it."""
    if "avx2" not in library.read_metadata(built)["target"]["features"]:
        pytest.skip("this CPU has no AVX2 to lose")
    monkeypatch.setattr(targets, "_cpu_flags", lambda: FLAGS)
    targets.host_target.cache_clear()
    with pytest.raises(module.BuildError, match=r"was built for a CPU \(.*\) with .*avx2.*, and this one has none"):
        library.read_library(built)


def test_a_library_must_suit_what_was_asked_for(
    module: ModuleType, library: ModuleType, weights: Path, built: Path, tmp_path: Path
) -> None:
    with pytest.raises(module.BuildError, match=r"is in float32, and float16 was asked for"):
        module.Model.load(weights, dtype="float16", library=built)
    target = {"kind": "cuda", "arch": "sm_90", "mcpu": "generic", "features": [], "json": ""}
    file = resealed(library, built, tmp_path / "model.so", target=target)
    with pytest.raises(module.BuildError, match=r"is for cuda sm_90, and the device is of kind llvm"):
        module.Model.load(weights, library=file)


def test_an_object_that_cannot_be_loaded_is_an_error(library: ModuleType, built: Path, tmp_path: Path) -> None:
    class Text(Kept):
        def export_library(self, file: str) -> None:
            Path(file).write_text("no ELF")

    library.write_library(Text(built), library.read_metadata(built), tmp_path / "model.so")
    with pytest.raises(library.BuildError, match=r"model\.so cannot be loaded: "):
        library.read_library(tmp_path / "model.so")


def test_an_unknown_dtype_is_refused(module: ModuleType, weights: Path) -> None:
    with pytest.raises(module.BuildError, match="dtype 'int3' is not one of float32, float16, bfloat16"):
        module.Model.load(weights, dtype="int3")


def test_the_package_runs_where_it_was_copied(package: Path, built: Path, weights: Path, tmp_path: Path) -> None:
    """Another folder and name: the same library."""
    copy = shutil.copytree(package, tmp_path / "my_model", ignore=shutil.ignore_patterns("__pycache__"))
    assert part(import_package(copy), "library").read_library(built).metadata["variant"] == "tiny"


# ------------------------------------------------------------------------------------------------------------- threads


def test_threads_follow_the_cores_of_the_process(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = part(module, "engine")
    for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "TVM_BIND_THREADS", "TVM_THREAD_POOL_SPIN_COUNT"):
        monkeypatch.setenv(name, "3")
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 6}, raising=False)
    engine.use_all_cores()
    assert (os.environ["TVM_NUM_THREADS"], os.environ["TVM_BIND_THREADS"]) == ("3", "0")
    monkeypatch.delenv("TVM_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine.use_all_cores()
    assert "TVM_NUM_THREADS" not in os.environ


def test_without_tvm_a_package_says_what_to_install(tmp_path: Path) -> None:
    package = emit(tiny_spec(), "tvm", tmp_path)
    script = f"import sys; sys.modules['tvm'] = None; import {package.name}"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("which is not installed: pip install apache-tvm==0.27.0.post1")
