"""What qwenspec does, in a minute: a spec becomes packages, and each computes what Hugging Face computes.

    python examples/demo.py

Generates Qwen3-0.6B's packages in Triton and in TVM, to be read, and those of the small trained checkpoint beside this
file. Those answer a question, alone and without qwenspec, and their logits are compared with Hugging Face's and with
each other's, in float32. Exits 1 if an answer is wrong or logits differ by more than rounding.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "tiny-qwen3"
OUT = ROOT / "build" / "demo"
BACKENDS = ("triton", "tvm")
TOLERANCE = 1e-4  # of the largest logit: float32 rounding, summed in another order

sys.path.insert(0, str(CHECKPOINT))
os.environ.setdefault("QWENSPEC_CACHE", str(OUT / "libraries"))  # what TVM compiles stays in the repository


def main() -> int:
    from tasks import DEMO

    say("1/4  A spec becomes a package for each backend: specs/qwen3.yaml, Qwen3-0.6B")
    generate("specs/qwen3.yaml")

    say("2/4  So does the spec of a small checkpoint that was trained on sums and sorting: examples/tiny-qwen3")
    generate("examples/tiny-qwen3/spec.yaml")

    say(f"3/4  The question: {DEMO.question!r}. The right answer: {DEMO.answer!r}")
    answers = [answer_of_the_package(f"tiny_qwen3_{backend}", DEMO.question) for backend in BACKENDS]
    print("Hugging Face transformers", flush=True)
    ids, theirs, reference = hugging_face(DEMO.question)
    print(f"  {theirs}")

    say(f"4/4  The logits of all {len(ids)} tokens of question and answer, in float32")
    same = compare({"Hugging Face": reference} | {backend: logits(backend, ids) for backend in BACKENDS})
    right = all(answer == DEMO.answer for answer in (*answers, theirs))
    print(f"\nThe answers are {'right' if right else 'WRONG'}, the functions {'the same' if same else 'DIFFERENT'}.")
    return 0 if right and same else 1


def say(text: str) -> None:
    print(f"\n--- {text}", flush=True)


def generate(spec: str) -> None:
    for backend in BACKENDS:
        command = ["gen", spec, "--backend", backend, "--out", "build/demo"]
        print(f"$ qwenspec {' '.join(command)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "qwenspec", *command, "--json"], cwd=ROOT, check=True, stdout=subprocess.PIPE
        )
        (written,) = json.loads(done.stdout)
        lines = written["lines"]
        read = ", ".join(f"{file} {lines[file]}" for file in ("model.py", "layers.py"))
        print(f"  {written['package']}: {len(lines)} files, {sum(lines.values())} lines ({read})")


def answer_of_the_package(package: str, question: str) -> str:
    """By `python -m <package>`, in the folder that holds packages and nothing else of ours."""
    command = ["-m", package, "--chat", "--prompt", question, "--dtype", "float32", "--device", "cpu"]
    print(f"$ python -m {package} --chat --prompt {question!r}", flush=True)
    weights = ["--weights", str(CHECKPOINT)]
    done = subprocess.run([sys.executable, *command, *weights], cwd=OUT, check=True, stdout=subprocess.PIPE, text=True)
    answer = done.stdout.strip()
    print(f"  {answer}", flush=True)
    return answer


def hugging_face(question: str):
    """Token ids of the whole exchange [n], the answer's text, and the logits [n, vocab]."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        ids = model.generate(**prompt, max_new_tokens=128, do_sample=False)
        logits = model(ids).logits[0]
    text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return ids[0].numpy(), text.strip(), logits.numpy()


def logits(backend: str, ids):
    """A package's logits of every token: ids [n] -> [n, vocab]."""
    import numpy as np

    from qwenspec import open_runner

    runner = open_runner(OUT / f"tiny_qwen3_{backend}", CHECKPOINT, device="cpu", dtype="float32")
    cache = runner.create_paged_kv_cache(1, len(ids), len(ids))
    cache.add_sequence(0)
    cache.begin_forward([0], [len(ids)])
    found = runner.batch_verify(runner.embed(ids.astype(np.int32)), cache)[0]
    cache.end_forward()
    return found


def compare(found) -> bool:
    """Prints the largest difference of each pair; whether all are small beside the first one's largest logit."""
    scale = abs(next(iter(found.values()))).max()
    print(f"{'largest logit':24}  {scale:.4g}")
    same = True
    for one, other in itertools.combinations(found, 2):
        difference = abs(found[one] - found[other]).max()
        print(f"{f'{one} and {other}':24}  differ by at most {difference:.2g}")
        same = same and bool(difference <= TOLERANCE * scale)
    return same


if __name__ == "__main__":
    sys.exit(main())
