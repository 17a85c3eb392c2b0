"""Generation from a generated package: greedy against a plain loop, sampling, batches, chunks, stop tokens, text."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from hf_parity.oracle import QWEN3, Oracle, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package

PROMPTS = [[5, 3, 8, 1, 9, 2], [7], [4] * 11]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(tiny_spec(QWEN3, {"vocab_size": 300}))


def write_tokenizer(folder: Path, template: str) -> Tokenizer:
    """A byte-level tokenizer.json; `template` is what the tokenizer makes of a text $A."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<end>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.fixture(scope="module")
def weights(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a byte-level tokenizer and a chat template."""
    folder = oracle.save(tmp_path_factory.mktemp("weights"))
    write_tokenizer(folder, "$A")
    (folder / "chat_template.jinja").write_text(
        "{%- for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{%- if add_generation_prompt %}[assistant]{% endif %}"
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 299]}')
    return folder


@pytest.fixture(scope="module")
def package(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emit(oracle.spec, "triton", tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def module(package: Path) -> ModuleType:
    return import_package(package)


@pytest.fixture(scope="module")
def model(module: ModuleType, weights: Path):
    return module.Model.load(weights)


def part(module: ModuleType, name: str) -> ModuleType:
    """A module of the package; its __init__ hides `generate` behind the function of that name."""
    return importlib.import_module(f"{module.__name__}.{name}")


def tokens(stream, prompts: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(prompts)]
    for token in stream:
        found[token.prompt].append(token.id)
    return found


def greedy_by_hand(oracle: Oracle, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(oracle.logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("chunk", [3, 7, 64])
def test_greedy_is_hugging_faces(oracle: Oracle, module: ModuleType, model, chunk: int) -> None:
    sampling = module.Sampling(max_tokens=6)
    found = tokens(module.generate(model, PROMPTS, sampling, prefill_chunk_size=chunk, page_size=4), len(PROMPTS))
    assert found == [greedy_by_hand(oracle, prompt, 6) for prompt in PROMPTS]


def test_stop_tokens_end_one_sequence_and_not_the_others(module: ModuleType, model) -> None:
    free = tokens(module.generate(model, PROMPTS, module.Sampling(max_tokens=8)), 3)
    stop = next(t for t in free[0] if t not in free[1] + free[2])
    sampling = module.Sampling(max_tokens=8, stop_tokens=frozenset([stop]))
    stream = list(module.generate(model, PROMPTS, sampling))
    found = tokens(stream, 3)
    assert found[0] == free[0][: free[0].index(stop) + 1]
    assert found[1:] == free[1:]
    assert {t.prompt: t.finished for t in stream if t.finished} == {0: "stop", 1: "length", 2: "length"}


def test_tokens_are_streamed(module: ModuleType, model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token comes before the second is computed."""
    stream = module.generate(model, PROMPTS[:1], module.Sampling(max_tokens=3))
    next(stream)
    monkeypatch.setattr(type(model), "batch_decode", lambda *_: pytest.fail("decoded too early"))
    stream.close()


def test_a_seed_draws_the_same_alone_and_in_a_batch(module: ModuleType, model) -> None:
    sampling = module.Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=7, max_tokens=10)
    batch = tokens(module.generate(model, PROMPTS, sampling), 3)
    alone = [tokens(module.generate(model, [p], sampling), 1)[0] for p in PROMPTS]
    assert batch == alone
    other = module.Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=8, max_tokens=10)
    assert tokens(module.generate(model, PROMPTS, other), 3) != batch


def test_draws_follow_the_distribution(module: ModuleType) -> None:
    """20,000 draws against softmax(logits / T), each count within five standard deviations."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 4.0])
    n, temperature = 20_000, 2.0
    sampling = module.Sampling(temperature=temperature)
    generator = torch.Generator().manual_seed(0)
    ids = part(module, "generate").sample(logits.expand(n, -1), sampling, [generator] * n).tolist()
    counts = Counter(ids)
    total = sum(math.exp(x / temperature) for x in logits.tolist())
    for i, x in enumerate(logits.tolist()):
        p = math.exp(x / temperature) / total
        assert abs(counts[i] - n * p) < 5 * math.sqrt(n * p * (1 - p))


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.integers(-16, 16).map(lambda i: i / 4), min_size=6, max_size=6, unique=True),
    top_k=st.integers(0, 7),
    top_p=st.floats(0.05, 1.0),
)
def test_top_k_and_top_p_keep_what_they_should(
    module: ModuleType, logits: list[float], top_k: int, top_p: float
) -> None:
    order = sorted(range(6), key=lambda i: -logits[i])[: top_k or 6]
    weights = [math.exp(logits[i]) for i in order]
    kept, mass = [], 0.0
    for i, weight in zip(order, weights, strict=True):
        if mass >= top_p * sum(weights) * (1 + 1e-5):
            break
        kept.append(i)
        mass += weight
    sampling = module.Sampling(temperature=1.0, top_k=top_k, top_p=top_p)
    generator = torch.Generator().manual_seed(1)
    drawn = part(module, "generate").sample(torch.tensor(logits).expand(300, -1), sampling, [generator] * 300)
    assert set(drawn.tolist()) <= set(kept)


def test_wrong_input_says_so(module: ModuleType, model) -> None:
    with pytest.raises(ValueError, match="top_p"):
        module.Sampling(top_p=0.0)
    with pytest.raises(ValueError, match="every prompt needs a token"):
        next(module.generate(model, [[1], []]))
    with pytest.raises(ValueError, match="token id 300 is outside the vocabulary of 300"):
        next(module.generate(model, [[300]]))


def test_a_package_has_its_text_side(module: ModuleType, weights: Path) -> None:
    text = module.Text(weights)
    ids = text.encode("naïve 雪")
    assert text.decode(ids) == "naïve 雪"
    assert text.stop_tokens() == {0, 299}
    assert text.chat([{"role": "user", "content": "hi"}]) == "[user]hi\n[assistant]"


@pytest.mark.parametrize("options", [[], ["--chat", "--prompt", "second"]])
def test_a_copied_package_runs_without_qwenspec(
    package: Path, weights: Path, tmp_path: Path, options: list[str], oracle: Oracle, module: ModuleType
) -> None:
    """python -m <package>, copied elsewhere under another name, with qwenspec made unimportable."""
    copy = tmp_path / "elsewhere" / "my_model"
    copy.mkdir(parents=True)
    for file in package.rglob("*"):
        if file.suffix in (".py", ".json"):
            target = copy / file.relative_to(package)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    (tmp_path / "elsewhere" / "qwenspec.py").write_text("raise ImportError('not installed')")
    command = [
        sys.executable,
        "-m",
        "my_model",
        "--weights",
        str(weights),
        "--prompt",
        "abc",
        "--max-tokens",
        "5",
    ]
    done = subprocess.run(
        [*command, *options], cwd=copy.parent, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    text = part(module, "text").Text(weights)
    prompt = text.chat([{"role": "user", "content": "abc"}]) if options else "abc"
    expected = text.decode(greedy_by_hand(oracle, text.encode(prompt), 5))
    assert expected.strip("\ufffd") in done.stdout
    if options:
        assert "--- second" in done.stdout


def test_an_embedding_model_reads_the_token_that_its_tokenizer_adds(tmp_path: Path) -> None:
    """python -m of an embedding package: the vector of the text and its end token, as Hugging Face tokenizes."""
    oracle = Oracle(tiny_spec(QWEN3, {"vocab_size": 300, "lm_head": None, "embedding": {"normalize": True}}))
    package = emit(oracle.spec, "triton", tmp_path)
    tokenizer = write_tokenizer(oracle.save(tmp_path / "weights"), "$A <end>")
    command = [sys.executable, "-m", package.name, "--weights", str(tmp_path / "weights"), "--prompt", "abc", "--json"]
    done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=True)
    ids = tokenizer.encode("abc").ids
    assert ids[-1] == tokenizer.token_to_id("<end>")
    assert json.loads(done.stdout)[0]["embedding"] == pytest.approx(oracle.logits(ids)[-1].tolist(), abs=1e-5)


def test_a_text_longer_than_the_model_was_made_for_is_noted(package: Path, weights: Path) -> None:
    command = [sys.executable, "-m", package.name, "--weights", str(weights), "--prompt", "abc", "--max-tokens"]
    for tokens, note in ((61, ""), (62, "note: up to 65 tokens, and the model was made for 64\n")):
        done = subprocess.run([*command, str(tokens)], cwd=package.parent, capture_output=True, text=True, check=True)
        assert done.stderr == note


def test_a_wrong_folder_is_one_line_and_exit_2(package: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", package.name, "--weights", str(tmp_path), "--prompt", "x"]
    done = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "tokenizer.json is missing" in done.stderr
