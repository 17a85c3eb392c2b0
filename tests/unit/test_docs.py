"""README and docs tell the truth: their commands run, print what is shown, and their excerpts are in the files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import ROOT

# A program writes mutants.md, and there are no commands in it.
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "mutants.md")]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.M | re.S)
NAMED = re.compile(r"# ([\w-]+\.yaml)\n")
EXITS = re.compile(r"  # exits (\d)$")


def blocks(page: Path, language: str) -> list[str]:
    return [match[3] for match in FENCE.finditer(page.read_text()) if match[2] == language]


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block, and the lines that are shown of what it prints."""
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, *shown = part.rstrip().split("\n")
        yield command, shown


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the repository, in which commands may write."""
    for name in ("specs", "examples", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_print_what_is_shown(page: Path, checkout: Path) -> None:
    for block in blocks(page, "yaml"):
        if named := NAMED.match(block):
            (checkout / named[1]).write_text(block)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    ran = 0
    for block in blocks(page, "console"):
        folder = checkout
        for command, shown in commands(block):
            if command.startswith("cd "):
                folder /= command.removeprefix("cd ")
                continue
            wanted = EXITS.search(command)
            # Targets of the Makefile exist; what they do is CI's own business.
            command = re.sub(r"^make ", "make --dry-run ", EXITS.sub("", command))
            done = subprocess.run(
                command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == int(wanted[1] if wanted else 0), f"{command}\n{done.stderr}"
            printed = (line.split() for line in (done.stdout + done.stderr).splitlines())  # columns may shift
            for line in shown:
                assert line.split() in printed, f"{command} does not print, or not in this order: {line!r}"
            ran += 1
    assert ran, f"{page.name} has no command"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(page: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that import something; those with a checkpoint of their own use the small one."""
    for block in blocks(page, "python"):
        if not block.startswith(("import", "from")):
            continue
        code = block.replace('load("qwen3-0.6b")', 'load("examples/tiny-qwen3/spec.yaml")')
        code = code.replace("specs/qwen3.yaml", "examples/tiny-qwen3/spec.yaml").replace("qwen3-0.6b", "tiny-qwen3")
        code = code.replace('weights="DIR"', 'weights="examples/tiny-qwen3"')
        for backend in ("triton", "tvm"):
            gen = ["gen", "examples/tiny-qwen3/spec.yaml", "--backend", backend, "--out", "."]
            subprocess.run([sys.executable, "-m", "qwenspec", *gen], cwd=checkout, check=True, capture_output=True)
        done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_excerpts_are_in_the_files() -> None:
    pages = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/spec.md"))
    excerpts = re.findall(r"^From `([^`]+)`:\n\n```\w+\n(.*?)^```$", pages, re.M | re.S)
    assert len(excerpts) == 4
    for name, excerpt in excerpts:
        lines = (re.sub(r" +#.*", "", line).rstrip() for line in (ROOT / name).read_text().splitlines())
        for line in filter(None, map(str.rstrip, excerpt.splitlines())):
            line = re.sub(r" +#.*", "", line)
            assert line in lines, f"{name} does not hold, or not in this order: {line!r}"


def test_what_is_installed_exists() -> None:
    """The README's pip lines, which need a network to run, name extras that there are."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"'\.\[(\w+)\]'", (ROOT / "README.md").read_text())
    assert {"run", "triton", "tvm"} <= set(named) <= extras.keys()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
