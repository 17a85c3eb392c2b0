"""Partial evaluation of source text."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from qwenspec.backend.fold import declared_flags, fold

KERNELS = Path(__file__).parent / "kernels"


def folded(source: str, **flags: bool | str | int) -> str:
    declarations = "".join(f"{name} = True  # flag: for the test\n" for name in flags)
    text = fold(declarations + dedent(source).lstrip("\n"), flags)
    compile(text, "folded", "exec")
    return text


def lines(text: str) -> str:
    return dedent(text).lstrip("\n")


IF = """
    def f(x):
        y = 0
        if FAST:  # a comment on the branch goes with it
            # inside
            y = (
                x  # kept, comment and layout
            )
            if x:
                y = 1
        elif SAFE:
            y = 2
        else:
            y = 3
        return y
"""


def test_if() -> None:
    assert folded(IF, FAST=True, SAFE=True) == lines("""
        def f(x):
            y = 0
            # inside
            y = (
                x  # kept, comment and layout
            )
            if x:
                y = 1
            return y
    """)


def test_elif_and_else() -> None:
    assert "y = 2" in folded(IF, FAST=False, SAFE=True)
    assert "y = 3" not in folded(IF, FAST=False, SAFE=True)
    assert folded(IF, FAST=False, SAFE=False) == "def f():\n    y = 0\n    y = 3\n    return y\n"


ELIF = """
    if x:
        a()
    elif FLAG:
        b()
    elif y:
        c()
    else:
        d()
"""


def test_elif_after_a_test_that_stays() -> None:
    assert folded(ELIF, FLAG=True) == "if x:\n    a()\nelse:\n    b()\n"
    assert folded(ELIF, FLAG=False) == "if x:\n    a()\nelif y:\n    c()\nelse:\n    d()\n"


def test_elif_takes_the_place_of_if() -> None:
    source = """
        if FLAG:
            a()
        elif y:
            b()
        else:
            c()
    """
    assert folded(source, FLAG=False) == "if y:\n    b()\nelse:\n    c()\n"


def test_last_elif_goes() -> None:
    source = "if x:\n    a()\nelif FLAG:\n    b()\n"
    assert folded(source, FLAG=False) == "if x:\n    a()\n"
    assert folded(source, FLAG=True) == "if x:\n    a()\nelse:\n    b()\n"


def test_nested_branches() -> None:
    source = """
        if A:
            if not B:
                x = 1
            else:
                x = 2 if B else 3
    """
    assert folded(source, A=True, B=True) == "x = 2\n"
    assert folded(source, A=True, B=False) == "x = 1\n"
    assert folded(source, A=False, B=False) == ""


def test_expressions() -> None:
    assert folded("x = (a + b) * (c if FLAG else d)", FLAG=True) == "x = (a + b) * (c)"
    assert folded("x = f(KIND == 'a' and g, h)", KIND="a") == "x = f(g, h)"
    assert folded("x = f(KIND == 'a' and g, h)", KIND="b") == "x = f(False, h)"
    assert folded("x = a if KIND in ('b', 'c') else b", KIND="c") == "x = a"
    assert folded("x = a if KIND not in ('b', 'c') else b", KIND="c") == "x = b"
    assert folded("x = FLAG and (a or b) and c", FLAG=True) == "x = (a or b) and c"
    assert folded("x = NUMBER != 2 or a", NUMBER=2) == "x = a"


def test_condition_with_a_flag_and_something_else() -> None:
    source = "if FLAG and x > 1:\n    a()\nb()\n"
    assert folded(source, FLAG=True) == "if x > 1:\n    a()\nb()\n"
    assert folded(source, FLAG=False) == "b()\n"


def test_text_before_a_column_is_not_ascii() -> None:
    assert folded("x = 'é √ 🜨' + (a if FLAG else b)", FLAG=False) == "x = 'é √ 🜨' + (b)"


PARAMETERS = """
    import math
    import os.path
    from cmath import exp, log

    LIMIT = 3


    def _helper(x):
        return os.path.join(x, log(LIMIT))


    def f(
        a: int,
        extra: str = "x",  # only when FLAG
        *,
        b: int = 2,
        last: int = math.pi,  # and this
    ):
        if FLAG:
            a += _helper(extra, last)
        return exp(a, b)


    f(1, "e", last=4, b=5)
    kernel = f[grid](
        1,
        "e",
        b=5,
        last=4,  # with its comment
    )
"""


def test_what_served_the_branch_goes_too() -> None:
    assert folded(PARAMETERS, FLAG=False) == lines("""
        from cmath import exp


        def f(
            a: int,
            *,
            b: int = 2,
        ):
            return exp(a, b)


        f(1, b=5)
        kernel = f[grid](
            1,
            b=5,
        )
    """)
    kept = folded(PARAMETERS, FLAG=True)
    for part in ("import math\nimport os.path\nfrom cmath import exp, log\n", "LIMIT = 3", 'extra: str = "x",  # only'):
        assert part in kept


def test_what_was_unused_before_stays() -> None:
    source = "import os\n\n\ndef f(a, b):\n    return 1 if FLAG else b\n\n\ndef g():\n    pass\n"
    assert folded(source, FLAG=True) == "import os\n\n\ndef f(a):\n    return 1\n\n\ndef g():\n    pass\n"


def test_parameters_go_along_a_chain_of_calls() -> None:
    source = """
        def outer(x, scale):
            return inner(x, scale)


        def inner(x, scale):
            return x * scale if SCALED else x
    """
    assert folded(source, SCALED=False) == "def outer(x):\n    return inner(x)\n\n\ndef inner(x):\n    return x\n"


def test_methods() -> None:
    source = """
        class Thing:
            if FLAG:
                extra: int = 0

            def __init__(self, a, b):
                self.a = self.pick(a, b)

            if FLAG:

                def more(self):
                    return 1

            def pick(self, a, b):
                if FLAG:
                    return b
                else:
                    return a


        Thing(1, 2)
    """
    text = folded(source, FLAG=False)
    assert "extra" not in text
    assert "more" not in text
    assert "def __init__(self, a):\n        self.a = self.pick(a)\n" in text
    assert text.endswith("Thing(1)\n")
    assert "\n    extra: int = 0\n" in folded(source, FLAG=True)
    assert "\n    def more(self):\n        return 1\n" in folded(source, FLAG=True)


RETURNS = """
    def f(x):
        if KIND == "awq":
            return x
        y = x + 1  # for the others
        if KIND == "gptq":
            if x:
                return y
            raise ValueError(x)
        for item in y:
            return helper(item)
        return y

    def helper(x):
        return x
"""


def test_what_follows_a_return_of_a_settled_branch_goes() -> None:
    """And what only it used."""
    assert folded(RETURNS, KIND="awq").rstrip("\n") + "\n" == lines("""
        def f(x):
            return x
    """)
    assert folded(RETURNS, KIND="gptq").rstrip("\n") + "\n" == lines("""
        def f(x):
            y = x + 1  # for the others
            if x:
                return y
            raise ValueError(x)
    """)
    other = folded(RETURNS, KIND="int8")
    assert "def helper" in other
    assert other.startswith(
        lines("""
        def f(x):
            y = x + 1  # for the others
            for item in y:
                return helper(item)
            return y
    """)
    )


METHODS = """
    class Matrix:
        def scales(self):
            return 1

        def order(self):
            return 2

    def f(matrix):
        if FLAG:
            scales = matrix.scales()
            order = scales + 1
            return order
        return matrix

    def order(x):
        return x

    def g(x):
        if FLAG:
            return order(x)
        return x
"""


def test_methods_stay_though_a_local_of_a_dropped_branch_has_their_name() -> None:
    """They are called from other files; a function of the module that nobody calls any more is not."""
    text = folded(METHODS, FLAG=False)
    assert re.findall(r"def (\w+)", text) == ["scales", "order", "f", "g"]
    assert "matrix.scales()" not in text
    assert folded(METHODS, FLAG=True).count("def ") == 5


DOCSTRING = '''
    def f(x):
        """Title.

        [FLAG] Only with it,
        [FLAG] on two lines.

        x: [N, 2] always
        [not FLAG and OTHER] y: shape
        """
'''


def test_docstrings() -> None:
    with_flag = folded(DOCSTRING, FLAG=True, OTHER=True)
    assert '"""Title.\n\n    Only with it,\n    on two lines.\n\n    x: [N, 2] always\n    """' in with_flag
    without = folded(DOCSTRING, FLAG=False, OTHER=True)
    assert '"""Title.\n\n    x: [N, 2] always\n    y: shape\n    """' in without


def test_docstring_whose_end_goes() -> None:
    source = '''
        def f():
            """Title.

            [FLAG] More."""
    '''
    assert folded(source, FLAG=False) == 'def f():\n    """Title."""\n'
    assert folded(source, FLAG=True) == 'def f():\n    """Title.\n\n    More."""\n'


def test_comments_at_the_end_of_a_branch() -> None:
    source = """
        def f(x):
            if FLAG:
                y = 1
                # one
            else:
                y = 2
                # other
            # both
            return y
    """
    for value, comment in ((True, "one"), (False, "other")):
        expected = f"def f(x):\n    y = {2 - value}\n    # {comment}\n    # both\n    return y\n"
        assert folded(source, FLAG=value) == expected


def test_flags_must_be_those_of_the_source() -> None:
    source = "A = tl.constexpr(True)  # flag: one\nB: bool = True  # flag: another\nC = 1\n"
    assert declared_flags(source) == {"A", "B"}
    assert fold(source, {"A": True, "B": False}) == "C = 1\n"
    with pytest.raises(AssertionError, match="declares"):
        fold(source, {"A": True})
    with pytest.raises(AssertionError, match="declares"):
        fold(source, {"A": True, "B": True, "C": True})


@pytest.mark.parametrize("use", ["x = FLAG", "f(FLAG)", "x = FLAG + 1", "while FLAG:\n    pass"])
def test_other_uses_are_errors(use: str) -> None:
    with pytest.raises(AssertionError, match="cannot fold"):
        folded(use, FLAG=True)


def test_kernels_are_clean_in_every_combination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(KERNELS))
    import kernel_variants

    for file in kernel_variants.FLAGS:
        for flags in kernel_variants.combinations(file):
            text = kernel_variants.folded(file, **flags)
            name = "_".join([file, *(str(value) for value in flags.values())])
            (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
            assert "# flag" not in text
            assert not set(flags) & set(re.findall(r"\w+", text))
            assert text == kernel_variants.folded(file, **flags)
    assert len(list(tmp_path.iterdir())) == 114
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F,E9", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    plain = (tmp_path / "qkv_False_False_False_False.py").read_text(encoding="utf-8")
    assert not {
        word for word in ("norm_weight", "eps", "LogN", "query_scale", "rest", "import torch.nn") if word in plain
    }
