"""A wheel built from the repository has everything that the command needs, outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from cli_runs import QWEN3, ROOT, call


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders in its source tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("qwenspec", "backends", "specs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
    ]
    subprocess.run([*pip, str(source)], check=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_its_packages(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    roots = [ROOT / "qwenspec", ROOT / "backends" / "qwenspec_triton", ROOT / "backends" / "qwenspec_tvm"]
    kinds = (".py", ".yaml", ".jinja", ".typed")
    wanted = {
        str(file.relative_to(root.parent))
        for root in roots
        for file in root.rglob("*")
        if file.suffix in kinds and "__pycache__" not in file.parts
    }
    wanted |= {f"qwenspec/specs/{file.name}" for file in (ROOT / "specs").glob("*.yaml")}
    assert wanted - held == set()
    assert not [name for name in held if name.startswith("specs/")]
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_the_installed_command_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    venv, away = tmp_path / "venv", tmp_path / "away"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # The dependencies are this environment's; a path file adds the folder and not what its own path files add,
    # such as an editable qwenspec.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    away.mkdir()
    shutil.copy(QWEN3, away / "qwen3.yaml")

    def run(*arguments: str) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [venv / "bin" / "qwenspec", *arguments], cwd=away, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    packages = ["qwenspec", "qwenspec_triton", "qwenspec_tvm"]
    found = subprocess.run(
        [python, "-c", f"import {', '.join(packages)}; print({', '.join(f'{p}.__file__' for p in packages)})"],
        cwd=away,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(path.startswith(site) for path in found.stdout.split())
    assert run("validate", "qwen3.yaml").startswith("qwen3.yaml: ")
    assert "triton" in run("backends")
    assert run("list") == call("list").stdout
    texts = {}
    for spec in ("qwen3.yaml", "qwen3-0.6b"):
        run("gen", spec, "--out", spec.replace(".", "_"))
        package = away / spec.replace(".", "_") / "qwen3_0_6b_triton"
        texts[spec] = (package / "config.py").read_text()
    assert texts["qwen3-0.6b"] == texts["qwen3.yaml"].replace("qwen3.yaml", "qwenspec:qwen3.yaml")
