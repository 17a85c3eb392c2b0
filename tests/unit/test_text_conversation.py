"""The command line of a package, with a model that says what it is told to: prompts, dialogues, JSON, trouble."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from text_folders import TINY, change, text_folder
from text_models import Scripted, emitted, part, patch

from qwenspec.backend.runtime.text import Text

TEXT = Text(TINY)
END = 2  # <|im_end|>
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", params=["triton", "tvm"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    found = emitted(request.param, tmp_path_factory.mktemp("package"))
    found.backend = request.param  # type: ignore[attr-defined]
    return found


@pytest.fixture
def model(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """What `Model.load` gives."""
    patch(package, package.backend, monkeypatch)
    found = Scripted(package.backend, {0: ids("1 2"), 1: ids("雪")})
    monkeypatch.setattr(package.Model, "load", lambda *_: found)
    return found


@pytest.fixture
def run(
    package: ModuleType, model: Scripted, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Exit code, stdout and stderr of `python -m package` with these arguments."""

    def call(*arguments: str, weights: Path = TINY, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["package", "--weights", str(weights), "--device", "cpu", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8"))
        code = part(package, "__main__").main()
        sys.stdout.flush()
        found = capfd.readouterr()
        return code, found.out, found.err

    return call


def ids(text: str) -> list[int]:
    return [*TEXT.encode(text, False), END]


def asked(model: Scripted) -> list[str]:
    """The texts of all prefills, special tokens among them."""
    return [TEXT._tokenizer._tokenizer.decode(prompt, skip_special_tokens=False) for prompt in model.prompts]


def test_a_prompt_as_it_is_and_as_a_chat(run: Run, model: Scripted) -> None:
    assert run("--prompt", "sort 1 2") == (0, "1 2\n", "")
    assert run("--prompt", "sort 1 2", "--chat") == (0, "1 2\n", "")
    chat = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nsort 1<|im_end|>\n<|im_start|>assistant\n"
    assert run("--prompt", "sort 1", "--chat", "--system", "Be brief.")[0] == 0
    assert asked(model) == ["sort 1 2", TEXT.chat([{"role": "user", "content": "sort 1 2"}]), chat]


def test_a_batch(run: Run) -> None:
    assert run("--prompt", "a", "--prompt", "b") == (0, "--- a\n1 2\n--- b\n雪\n", "")


def test_json_says_how_an_answer_ended(run: Run, model: Scripted) -> None:
    code, out, err = run("--prompt", "a", "--prompt", "b b", "--json", "--max-tokens", "3")
    assert (code, err) == (0, "")
    first, second = json.loads(out)
    assert first == {"prompt": "a", "text": "1 2", "prompt_tokens": 1, "tokens": 3, "finish_reason": "stop"}
    assert second["text"] == TEXT.decode(ids("雪")[:3])
    assert second["tokens"] == 3
    assert second["finish_reason"] == ("stop" if len(ids("雪")) <= 3 else "length")


def test_stats(run: Run) -> None:
    code, out, err = run("--prompt", "a", "--stats")
    assert (code, out) == (0, "1 2\n")
    assert err.startswith("1 + 3 tokens, stop, ")
    assert err.endswith(" tokens/s\n")
    code, out, err = run("--prompt", "a", "--prompt", "b", "--stats", "--json")
    assert [entry["tokens_per_second"] > 0 for entry in json.loads(out)] == [True, True]
    assert len(err.splitlines()) == 2


def test_stop_strings(run: Run, model: Scripted) -> None:
    model.script = {0: ids("one two three"), 1: ids("another")}
    assert run("--prompt", "a", "--stop", "e t", "--stop", "wo t") == (0, "on\n", "")
    first, second = json.loads(run("--prompt", "a", "--prompt", "b", "--stop", "e t", "--json")[1])
    assert (first["text"], first["finish_reason"]) == ("on", "stop")
    assert (second["text"], second["finish_reason"]) == ("another", "stop")
    assert run("--prompt", "a", "--stop", "three four") == (0, "one two three\n", "")  # what was held back is told
    assert run("--prompt", "a", "--stop", "") == (2, "", "error: a stop string is empty\n")


def test_thinking_is_told_when_it_is_said(run: Run, model: Scripted, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x", chat_template__jinja="{{ enable_thinking }}|{{ enable_thinking is defined }}")
    for option in ([], ["--thinking"], ["--no-thinking"]):
        assert run("--prompt", "a", "--chat", *option, weights=folder)[0] == 0
    assert asked(model) == ["|False", "True|True", "False|True"]


def test_a_chat_gets_no_tokens_that_the_tokenizer_adds(run: Run, model: Scripted, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x", chat_template__jinja="{{ messages[0].content }}")
    end = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
    added = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"<|endoftext|>": end}}
    change(folder / "tokenizer.json", post_processor=added)
    assert run("--prompt", "a", weights=folder)[0] == 0
    assert run("--prompt", "a", "--chat", weights=folder)[0] == 0
    assert asked(model) == ["a<|endoftext|>", "a"]


def test_a_prompt_from_standard_input(run: Run, model: Scripted) -> None:
    assert run("--prompt", "-", stdin="sort\n1 é\n".encode()) == (0, "1 2\n", "")
    assert asked(model) == ["sort\n1 é"]
    assert run("--prompt", "-", stdin=b"\xff") == (2, "", "error: standard input is not UTF-8\n")


def test_a_dialogue(run: Run, model: Scripted) -> None:
    """Each line is a turn, and what was said before is there."""
    code, out, err = run("--chat", "--system", "S", stdin="first\n\n  \nsecond é".encode())
    assert (code, out, err) == (0, "1 2\n1 2\n", "")
    start = [{"role": "system", "content": "S"}, {"role": "user", "content": "first"}]
    more = [{"role": "assistant", "content": "1 2"}, {"role": "user", "content": "second é"}]
    assert asked(model) == [TEXT.chat(start), TEXT.chat([*start, *more])]
    code, out, _ = run("--chat", "--json", stdin=b"a\nb\n")
    assert [(entry["prompt"], entry["text"]) for entry in json.loads(out)] == [("a", "1 2"), ("b", "1 2")]
    assert run("--chat", stdin=b"") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give a --prompt, or --chat for a dialogue"),
        (["--prompt", "a", "--system", "S"], "are for a chat: give --chat too"),
        (["--prompt", "a", "--no-thinking"], "are for a chat: give --chat too"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is a number from 0 on, and not nan"),
        (["--prompt", "a", "--seed", "-1"], "seed is an integer from 0 to 2^64 - 1, and not -1"),
        (["--prompt", "ab\udcff"], "the text is not UTF-8: character 3 is '\\udcff'"),
        (["--prompt", ""], "every prompt needs a token"),
    ],
)
def test_what_cannot_be_is_a_sentence(run: Run, arguments: list[str], reason: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith(f"{reason}\n")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--chat"], ["--prompt", "-"], ["--prompt", "a", "--prompt", "-"]])
def test_several_ranks_read_no_standard_input(package: ModuleType, arguments: Sequence[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    conversation = part(package, "conversation")
    conversation.add_options(parser)
    with pytest.raises(package.TextError, match="several ranks read no standard input: give a --prompt"):
        conversation.check(parser.parse_args(arguments), ranks=2)
    conversation.check(parser.parse_args(["--prompt", "a"]), ranks=2)


def test_ranks_compare_what_they_are_asked(run: Run, package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is loaded; a template may have told them different times."""
    main, said = part(package, "__main__"), []

    def join(device: str, **facts: object) -> Any:
        said.append(facts)
        return SimpleNamespace(rank=0, size=1)

    monkeypatch.setattr(main, "join", join)
    for arguments in (["--prompt", "a"], ["--prompt", "a"], ["--prompt", "b"], ["--prompt", "a", "--temperature", "1"]):
        assert run(*arguments)[0] == 0
    first, again, other, sampled = (facts["hash of what is asked"] for facts in said[1::2])
    assert first == again
    assert len({first, other, sampled}) == 3


# ----------------------------------------------------------------------------------------- generation_config.json


SAID = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": END}


@pytest.fixture
def chosen(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `generate` is asked."""
    found: list[Any] = []
    answers = part(package, "answers")
    there = answers.generate

    def watched(model: Any, prompts: Any, sampling: Any, **options: Any) -> Any:
        found.append(sampling)
        return there(model, prompts, package.Sampling(stop_tokens=sampling.stop_tokens), **options)

    monkeypatch.setattr(answers, "generate", watched)
    return found


@pytest.mark.parametrize(
    ("arguments", "values", "note"),
    [
        ([], (0.6, 20, 0.95), "temperature 0.6, top_k 20, top_p 0.95"),
        (["--temperature", "0"], (0, 0, 1), None),
        (["--temperature", "0.9"], (0.9, 20, 0.95), "top_k 20, top_p 0.95"),
        (["--top-k", "3", "--top-p", "1"], (0.6, 3, 1), "temperature 0.6"),
        (["--top-k", "0", "--top-p", "1", "--temperature", "2"], (2, 0, 1), None),
    ],
)
def test_its_sampling_is_the_default_and_said(
    run: Run, chosen: list[Any], arguments: list[str], values: tuple[float, ...], note: str | None, tmp_path: Path
) -> None:
    folder = text_folder(tmp_path / "x", generation_config__json=SAID)
    said = "" if note is None else f"note: generation_config.json says {note}; --temperature 0 is greedy\n"
    assert run("--prompt", "a", *arguments, weights=folder) == (0, "1 2\n", said)
    assert (chosen[0].temperature, chosen[0].top_k, chosen[0].top_p) == values
    assert chosen[0].stop_tokens == {END}


def test_without_do_sample_it_is_greedy(run: Run, chosen: list[Any], tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x", generation_config__json=SAID | {"do_sample": False})
    assert run("--prompt", "a", weights=folder) == (0, "1 2\n", "")
    assert run("--prompt", "a", "--temperature", "0.5", weights=folder) == (0, "1 2\n", "")
    assert [(s.temperature, s.top_k, s.top_p) for s in chosen] == [(0, 0, 1), (0.5, 0, 1)]


def test_what_is_not_applied_is_said(run: Run, tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "x")
    change(folder / "generation_config.json", repetition_penalty=1.05)
    note = "note: generation_config.json says repetition_penalty 1.05, which is not applied\n"
    assert run("--prompt", "a", weights=folder) == (0, "1 2\n", note)


# ------------------------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 2, "error: there is not enough memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
            2,
            "error: there",
        ),
        (RuntimeError("std::bad_alloc"), 2, "error: there is not enough memory"),
        (OSError(28, "No space left on device", "/x"), 2, "error: /x: No space left on device"),
        (OSError("no such thing"), 2, "error: no such thing"),
        (ValueError("no"), 2, "error: no"),
    ],
)
def test_trouble_is_a_sentence(
    run: Run, package: ModuleType, error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr(package.Model, "load", load)
    found, out, err = run("--prompt", "a")
    assert (found, out) == (code, "")
    assert err.startswith(said)
    assert len(err.splitlines()) == bool(said)


def test_our_own_mistakes_are_not_told_as_trouble(
    run: Run, package: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package.Model, "load", lambda *_: SimpleNamespace())
    with pytest.raises(AttributeError):
        run("--prompt", "a")


def test_a_terminal_that_lacks_a_character(
    package: ModuleType, model: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["package", "--weights", str(TINY), "--device", "cpu", "--prompt", "x"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    model.script = {0: ids("é雪")}
    assert part(package, "__main__").main() == 0
    assert written.getvalue() == b"\xe9?\n"


def test_a_closed_standard_output(
    package: ModuleType, model: Scripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `>&-` gives it."""
    monkeypatch.setattr(sys, "argv", ["package", "--weights", str(TINY), "--device", "cpu", "--prompt", "x"])
    monkeypatch.setattr(sys, "stdout", None)
    assert part(package, "__main__").main() == 2
    assert capsys.readouterr().err == "error: standard output is closed, and answers go there\n"


@pytest.mark.parametrize("backend", ["triton", "tvm"])
def test_an_embedding_that_is_not_finite(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = emitted(backend, tmp_path, "  lm_head: null\n  embedding: {normalize: true}\n")
    model = Scripted(backend, {})
    monkeypatch.setattr(package.Model, "load", lambda *_: model)
    vectors = iter([[0.6, 0.8], [0.6, float("nan")], [0.6, 0.8], [float("-inf"), 0.0]])
    monkeypatch.setattr(model, "prefill", lambda *_: model.array([[next(vectors)]]), raising=False)
    monkeypatch.setattr(sys, "argv", ["package", "--weights", str(TINY), "--device", "cpu", *["--prompt", "x"] * 2])
    for _ in range(2):
        assert part(package, "__main__").main() == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("error: the embedding of prompt 1 is NaN or infinite: float16 ends at 65504")


@pytest.mark.parametrize("asked", [["--chat"], ["--prompt", "-"]])
def test_there_may_be_no_standard_input(
    package: ModuleType, run: Run, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = part(package, "conversation")
    monkeypatch.setattr(conversation, "sys", SimpleNamespace(stdin=None, stderr=sys.stderr))
    assert run(*asked) == (2, "", "error: there is no standard input\n")
