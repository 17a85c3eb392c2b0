"""What qwenspec does, in a minute: a spec becomes a package, and the package computes what Hugging Face computes.

    python examples/demo.py

Generates the package of Qwen3-0.6B to be read, then that of the small trained checkpoint beside this file. That one
answers a question, alone and without qwenspec, and its logits are compared with Hugging Face's in float32. Exits 1
if the answer is wrong or the logits differ by more than rounding.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "tiny-qwen3"
OUT = ROOT / "build" / "demo"
TOLERANCE = 1e-4  # of the largest logit: float32 rounding, summed in another order

sys.path.insert(0, str(CHECKPOINT))


def main() -> int:
    from tasks import DEMO

    say("1/4  A spec becomes a package: specs/qwen3.yaml")
    qwenspec("gen", "specs/qwen3.yaml", "--backend", "triton", "--out", "build/demo")

    say("2/4  So does the spec of a small checkpoint that was trained on sums and sorting: examples/tiny-qwen3")
    qwenspec("gen", "examples/tiny-qwen3/spec.yaml", "--backend", "triton", "--out", "build/demo")

    say(f"3/4  The question: {DEMO.question!r}. The right answer: {DEMO.answer!r}")
    print("the generated package:  ", end="", flush=True)
    ours = answer_of_the_package(DEMO.question)
    print(repr(ours))
    print("Hugging Face:           ", end="", flush=True)
    ids, theirs, reference = hugging_face(DEMO.question)
    print(repr(theirs))

    say("4/4  The logits of every position of question and answer, in float32")
    difference, scale = compare(ids, reference)
    print(f"largest difference:     {difference:.3g}, where the largest logit is {scale:.3g}")
    right, same = ours == theirs == DEMO.answer, difference <= TOLERANCE * scale
    print(f"\nThe answer is {'right' if right else 'WRONG'}, and the function {'the same' if same else 'DIFFERENT'}.")
    return 0 if right and same else 1


def say(text: str) -> None:
    print(f"\n--- {text}", flush=True)


def qwenspec(*arguments: str) -> None:
    print(f"$ qwenspec {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "qwenspec", *arguments], cwd=ROOT, check=True)


def answer_of_the_package(question: str) -> str:
    """By `python -m tiny_qwen3_triton`, in the folder that holds the package and nothing else of ours."""
    arguments = ["--weights", str(CHECKPOINT), "--prompt", question, "--chat", "--dtype", "float32"]
    command = [sys.executable, "-m", "tiny_qwen3_triton", *arguments]
    done = subprocess.run(command, cwd=OUT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


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


def compare(ids, reference) -> tuple[float, float]:
    """Largest absolute difference of the package's logits from the reference, and the reference's largest logit."""
    import numpy as np

    from qwenspec import open_runner

    runner = open_runner(OUT / "tiny_qwen3_triton", CHECKPOINT, device="cpu", dtype="float32")
    cache = runner.create_paged_kv_cache(1, len(ids), len(ids))
    cache.add_sequence(0)
    cache.begin_forward([0], [len(ids)])
    logits = runner.batch_verify(runner.embed(ids.astype(np.int32)), cache)[0]
    cache.end_forward()
    return float(np.abs(logits - reference).max()), float(np.abs(reference).max())


if __name__ == "__main__":
    sys.exit(main())
