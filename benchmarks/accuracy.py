"""The share of tiny-qwen3's held-out problems that a generated package answers correctly.

    python benchmarks/accuracy.py --package DIR --weights DIR [--limit N]

The package is imported from its folder, as a user would. The weights are those of the model that it was
generated for: examples/tiny-qwen3, or what became of them (quantised, say).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from packages import ROOT, open_package

sys.path.insert(0, str(ROOT / "examples" / "tiny-qwen3"))
import tasks

MAX_TOKENS = 24  # the longest answer has 8 items and the end


def greedy(
    package_folder: Path, weights: Path, device: str, dtype: str | None, batch: int = 64
) -> Callable[[list[str]], list[str]]:
    """`generate` of tasks.accuracy: the package's own generation."""
    package = open_package(package_folder)
    text = import_module(f"{package.__name__}.text").Text(weights)
    model = package.Model.load(weights, device, dtype)
    stop = text.stop_tokens()
    sampling = package.Sampling(max_tokens=MAX_TOKENS, stop_tokens=stop)

    def generate(prompts: list[str]) -> list[str]:
        ids: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(prompts), batch):
            encoded = [text.encode(prompt) for prompt in prompts[start : start + batch]]
            for token in package.generate(model, encoded, sampling):
                if token.id not in stop:
                    ids[start + token.prompt].append(token.id)
        return [text.decode(of_prompt) for of_prompt in ids]

    return generate


def main() -> None:
    """Measure and print a table, the tasks by row and the prompt formats by column."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, metavar="DIR", help="a generated package")
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR", help="a Hugging Face checkpoint folder")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="problems of each task (default: 100)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the package's own")
    args = parser.parse_args()

    generate = greedy(args.package.resolve(), args.weights, args.device, args.dtype)
    problems = tasks.held_out_problems(args.limit)
    shares = {form: tasks.accuracy(generate, problems, prompt) for form, prompt in tasks.FORMATS.items()}
    print(f"{'task':10s}" + "".join(f"{form:>8s}" for form in shares))
    for task in tasks.TASKS:
        print(f"{task:10s}" + "".join(f"{of_task[task]:8.1%}" for of_task in shares.values()))
    means = [sum(of_task.values()) / len(of_task) for of_task in shares.values()]
    print(f"{'all':10s}" + "".join(f"{mean:8.1%}" for mean in means))


if __name__ == "__main__":
    main()
