"""tiny-qwen3's committed checkpoint, and the script that trained it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwenspec.spec.load import load

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny-qwen3"))
import tasks
import train

EXAMPLE = train.HERE


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(EXAMPLE)


@pytest.mark.parametrize("form", tasks.FORMATS)
def test_it_answers_held_out_problems(form: str) -> None:
    problems = [tasks.DEMO, *tasks.held_out_problems(5, seed=2)]
    shares = tasks.accuracy(train.greedy(EXAMPLE), problems, tasks.FORMATS[form])
    counts = {task: sum(p.task == task for p in problems) for task in shares}
    assert sum(shares[task] * counts[task] for task in shares) / len(problems) >= 0.95
    assert shares["sort"] == 1.0  # the demonstration among them


def test_the_chat_template_renders_what_was_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": tasks.DEMO.question}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == tasks.chat(
        tasks.DEMO.question
    )
    answered = [*messages, {"role": "assistant", "content": tasks.DEMO.answer}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == (
        f"{tasks.chat(tasks.DEMO.question)}{tasks.DEMO.answer}<|im_end|>\n"
    )


def test_the_committed_tokenizer_is_the_scripts_own(tokenizer: PreTrainedTokenizerFast) -> None:
    committed, built = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")), train.build_tokenizer()
    assert committed.get_vocab() == tokenizer.get_vocab() == built.get_vocab()
    for p in tasks.held_out_problems(3):
        for prompt in tasks.FORMATS.values():
            ids = committed.encode(prompt(p.question)).ids
            assert ids == tokenizer.encode(prompt(p.question)) == built.encode(prompt(p.question))


@pytest.mark.parametrize("text", ["sort 5 3 9 1", "27 + 58 = 85", "any text: naïve, 数, 🙂\n\tend ", "  two  spaces"])
def test_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_character_and_known_word_is_one_token() -> None:
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>user\nsort 5 b").tokens == [
        "<|im_start|>", "user", "Ċ", "sort", "Ġ5", "Ġb",
    ]  # fmt: skip
    for word in train.WORDS:
        assert len(tokenizer.encode(word).ids) == 1, word
    for p in tasks.held_out_problems(20):
        digits_and_signs = p.question.replace(" ", "") if p.task in ("add", "subtract") else None
        if digits_and_signs is not None:
            assert len(tokenizer.encode(p.question).ids) == len(digits_and_signs)


def test_the_spec_is_the_checkpoints() -> None:
    architecture = load(EXAMPLE / "spec.yaml").architecture
    config = json.loads((EXAMPLE / "config.json").read_text())
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "max_position_embeddings", "tie_word_embeddings", "dtype",
    ):  # fmt: skip
        assert getattr(architecture, name) == config[name], name
    assert architecture.attention.head_dim == config["head_dim"]
    assert architecture.norm.eps == config["rms_norm_eps"]
    assert architecture.rope.theta == config["rope_parameters"]["rope_theta"]


def test_the_checkpoint_is_small_and_in_bfloat16() -> None:
    file = EXAMPLE / "model.safetensors"
    assert file.stat().st_size <= 5_000_000
    with safe_open(str(file), framework="pt") as tensors:
        slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118  (no mapping)
        assert {s.get_dtype() for s in slices} == {"BF16"}
        widths = {s.get_shape()[1] for s in slices if len(s.get_shape()) == 2}
    assert all(width % 128 == 0 for width in widths)  # groups of 32, 64 and 128 divide every linear's inputs


def test_the_training_script_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--out", str(tmp_path), "--steps", "2", "--eager", "--per-task", "1"])
    output = capsys.readouterr().out
    assert "loss" in output
    assert "plain" in output
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (tmp_path / name).read_text() == (EXAMPLE / name).read_text(), name
    train.main(["--out", str(tmp_path), "--report", "--per-task", "1"])
    assert capsys.readouterr().out == output[output.index("held-out") :]
