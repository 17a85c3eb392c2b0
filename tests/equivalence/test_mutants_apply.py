"""The planted mistakes are where they say, one text each, and leave sources that can still be read."""

from __future__ import annotations

import ast
import shutil
from collections import Counter
from pathlib import Path

import jinja2
import pytest
import yaml
from mutant import ROOT, Mutant
from mutants import FILES, MUTANTS, listed

# Every part of the house that decides what a model computes, and how many mistakes it has at least.
PARTS = {
    "qwenspec/ir/lower.py": 8,
    "qwenspec/ir/rope.py": 6,
    "qwenspec/ir/weights.py": 3,
    "qwenspec/ir/shard.py": 4,
    "qwenspec/ir/shares.py": 8,
    "qwenspec/backend/": 6,
    "backends/qwenspec_triton/templates/": 3,
    "backends/qwenspec_tvm/templates/": 3,
    "backends/qwenspec_triton/kernels/": 16,
    "backends/qwenspec_tvm/kernels/": 16,
    "backends/qwenspec_triton/runtime/": 2,
    "backends/qwenspec_tvm/runtime/": 2,
}
OF_FILES = 60  # mistakes outside of what a model computes, at least


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_is_one_text_of_a_source_that_still_reads(mutant: Mutant, tmp_path: Path) -> None:
    copy = tmp_path / mutant.file
    copy.parent.mkdir(parents=True)
    shutil.copyfile(ROOT / mutant.file, copy)
    mutant.apply(tmp_path)
    before, after = (ROOT / mutant.file).read_text(encoding="utf-8"), copy.read_text(encoding="utf-8")
    if copy.suffix == ".py":
        assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before)), "it changes no code"
    elif copy.suffix == ".yaml":
        assert yaml.safe_load(after) != yaml.safe_load(before), "it changes no value"
    else:
        jinja2.Environment().parse(after)
        assert after.split() != before.split(), "it changes no code"


def test_a_mistake_whose_text_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("x = 1\ny = 1\n")
    for old, times in (("z = 1", 0), (" = 1", 2)):
        with pytest.raises(ValueError, match=f"has the text {times} times"):
            Mutant("none", "file.py", old, "", "").apply(tmp_path)


def test_tests_that_must_notice_are_there() -> None:
    named = {test.partition("::")[0] for mutant in MUTANTS for test in mutant.tests}
    assert [test for test in sorted(named) if not (ROOT / test).is_file()] == []


def test_every_file_of_mistakes_is_planted() -> None:
    assert {file.stem for file in Path(__file__).parent.glob("mutants_*.py")} == set(FILES)
    assert all(set(listed(file)) <= set(MUTANTS) for file in FILES)


def test_names_are_unique() -> None:
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []


def test_every_part_of_the_house_has_mistakes() -> None:
    found = {part: sum(mutant.file.startswith(part) for mutant in MUTANTS) for part in PARTS}
    assert {part: count for part, count in found.items() if count < PARTS[part]} == {}
    assert sum(not mutant.tests for mutant in MUTANTS) >= 50
    assert sum(bool(mutant.tests) for mutant in MUTANTS) >= OF_FILES


def test_what_only_the_interpreter_runs_is_in_kernels() -> None:
    interpreted = [mutant for mutant in MUTANTS if mutant.interpreted]
    assert len(interpreted) >= 8
    assert all(mutant.file.startswith("backends/qwenspec_triton/kernels/") for mutant in interpreted)
