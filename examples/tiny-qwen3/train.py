"""Train tiny-qwen3 with Hugging Face's Qwen3 class, save it as a Hugging Face folder, report its accuracy.

    python examples/tiny-qwen3/train.py --out DIR

With its defaults this writes the committed checkpoint. Problems, weights and order are seeded; another torch,
processor or number of threads may still round differently.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tasks
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
WORDS = [
    "user",
    "assistant",
    "system",
    "copy",
    "reverse",
    "sort",
    "count",
    " in",
    "max",
    "min",
    " +",
    " -",
    " =",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = Qwen3Config(
    vocab_size=384,  # the tokenizer's, padded to a multiple of 128
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    max_window_layers=3,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
)
# How often a task comes in 16 problems: what is learnt late comes more often.
MIX = {"copy": 1, "reverse": 1, "sort": 2, "count": 2, "max": 2, "min": 2, "add": 3, "subtract": 3}
BATCH = 64
PEAK_LR, WARMUP = 1.5e-3, 200
LENGTHS = {"plain": 18, "chat": 25}  # tokens of the longest problem, its end left out, by format
IGNORE = -100  # cross_entropy's mark for a position without loss


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: known words are one token each, as are digits and letters, also with a space before."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([END_OF_TEXT, IM_START, IM_END, *alphabet])}
    merges = []
    for word in [f" {c}" for c in tasks.DIGITS + tasks.LETTERS] + WORDS:
        word = word.replace(" ", "Ġ")
        for end in range(1, len(word)):
            if word[: end + 1] not in vocab:
                merges.append((word[:end], word[end]))
                vocab[word[: end + 1]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (END_OF_TEXT, IM_START, IM_END)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        model_max_length=CONFIG.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(tokenizer: Tokenizer, problems: Sequence[tasks.Problem], form: str) -> tuple[Tensor, Tensor]:
    """Input ids and labels [b, t], padded on the right; only the answer and its end have labels.

    t is the same for every batch of a format, so that each format is compiled once.
    """
    separator, end = (" ", END_OF_TEXT) if form == "plain" else ("", IM_END)
    prompts = tokenizer.encode_batch([tasks.FORMATS[form](p.question) for p in problems])
    answers = tokenizer.encode_batch([f"{separator}{p.answer}{end}" for p in problems])
    ids = torch.zeros(len(problems), LENGTHS[form] + 1, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        both = torch.tensor(prompt.ids + answer.ids)
        ids[row, : len(both)] = both
        labels[row, len(prompt.ids) : len(both)] = both[len(prompt.ids) :]
    return ids[:, :-1], labels[:, 1:]


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches, the formats in turn."""
    stream = tasks.problems(seed, held_out=False, tasks=[task for task, times in MIX.items() for _ in range(times)])
    for form in itertools.cycle(tasks.FORMATS):
        yield encode(tokenizer, list(itertools.islice(stream, BATCH)), form)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    progress = max(0.0, (step - WARMUP) / max(1, steps - WARMUP))
    return PEAK_LR * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Qwen3ForCausalLM, tokenizer: Tokenizer, steps: int, seed: int, compiled: bool) -> None:
    """AdamW on the answers' cross-entropy, each problem counting the same whatever its answer's length."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
        return (losses.sum(-1) / (labels != IGNORE).sum(-1)).mean()

    step_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    sample = tasks.held_out_problems(32, seed=1)  # not the problems of the final report
    start = time.perf_counter()
    for step, (ids, labels) in zip(range(steps), batches(tokenizer, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = step_loss(ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            right = " ".join(f"{task} {share:.2f}" for task, share in teacher_forced(model, tokenizer, sample).items())
            print(
                f"{step + 1:6d} {time.perf_counter() - start:5.0f} s  loss {loss.item():.4f}  {right}",
                flush=True,
            )


@torch.inference_mode()
def teacher_forced(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, problems: Sequence[tasks.Problem]
) -> dict[str, float]:
    """Accuracy in one forward.

    Greedy decoding gives an answer when each of its tokens is the likeliest after the right ones before it.
    """
    ids, labels = encode(tokenizer, problems, "chat")
    hits = (model(input_ids=ids, use_cache=False).logits.argmax(-1) == labels) | (labels == IGNORE)
    answers = [p.answer if hit else "" for p, hit in zip(problems, hits.all(-1).tolist(), strict=True)]
    return tasks.accuracy(lambda _: answers, problems)


def greedy(folder: Path, batch: int = 64) -> Callable[[list[str]], list[str]]:
    """`generate` of tasks.accuracy: Hugging Face's own generation with a folder's weights, in float32."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")

    def generate(prompts: list[str]) -> list[str]:
        completions: list[str] = []
        for i in range(0, len(prompts), batch):
            inputs = tokenizer(prompts[i : i + batch], return_tensors="pt", padding=True, return_token_type_ids=False)
            output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
            completions += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return completions

    return generate


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """An ordinary Hugging Face folder, the weights in bfloat16."""
    ends = [tokenizer.convert_tokens_to_ids(t) for t in (IM_END, END_OF_TEXT)]
    model.config.eos_token_id = ends[0]
    model.config.pad_token_id = ends[1]
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends[1])
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def report(folder: Path, per_task: int) -> None:
    """Print the accuracy on held-out problems, by format and task."""
    print(f"held-out problems, {per_task} a task, weights in bfloat16, computed in float32")
    generate = greedy(folder)
    for form, prompt in tasks.FORMATS.items():
        shares = tasks.accuracy(generate, tasks.held_out_problems(per_task), prompt)
        print(f"{form:6s}", *(f"{task} {share:.1%}" for task, share in shares.items()), sep="  ")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, train, save, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write (default: the committed one)")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile (slower; needs no C++ compiler)")
    parser.add_argument("--per-task", type=int, default=250, help="held-out problems of each task in the report")
    parser.add_argument("--report", action="store_true", help="only report the accuracy of what is in --out")
    args = parser.parse_args(arguments)

    if not args.report:
        torch.manual_seed(args.seed)
        tokenizer = build_tokenizer()
        model = Qwen3ForCausalLM(CONFIG)
        print(f"{model.num_parameters():,} parameters, {torch.get_num_threads()} threads", flush=True)
        train(model, tokenizer.backend_tokenizer, args.steps, args.seed, compiled=not args.eager)
        save(model, tokenizer, args.out)
    report(args.out, args.per_task)


if __name__ == "__main__":
    main()
