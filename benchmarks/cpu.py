"""Decoding and prefill on CPU, a generated package beside Hugging Face: python benchmarks/cpu.py.

Each contender is a process of its own with the model's full shape and random weights; rounds alternate between
them, so that both meet the same neighbours on the machine. The limits are measured in the same rounds: reading the
weights once for a decoded token, the matrix products at torch's best rate for a prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = ("ours", "hugging face")
WORKS = ("decode", "prefill 128", "prefill 512")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=HERE.parent / "generated" / "qwen3_0_6b_triton")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layers", type=int, help="fewer than the model has, for a quick look")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--verify", action="store_true", help="first compare the two models' logits")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    args = parser.parse_args()
    children = {peer: start(peer, args) for peer in PEERS}
    try:
        if args.verify and (difference := logit_difference(children)) > (1e-4 if args.dtype == "float32" else 5e-2):
            print(f"the models disagree: {difference:.1e} of the largest logit", file=sys.stderr)
            return 1
        play(children, order=PEERS)  # warms up
        rounds = []
        for i in range(args.rounds):
            rounds.append(play(children, PEERS if i % 2 else PEERS[::-1]))
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
        medians = {name: median(r[name] for r in rounds) for name in rounds[0]}
        print(json.dumps({"rounds": rounds, "medians": medians}, indent=1) if args.json else render(medians))
    finally:
        for child in children.values():
            child.stdin.close()
            child.wait()
    return 0


def start(peer: str, args: argparse.Namespace) -> Any:
    """A contender in a new process, to be driven line by line."""
    command = [sys.executable, str(HERE / "cpu_peer.py"), peer, str(args.package), args.dtype, str(args.layers or 0)]
    # Barriers that spin are slow beyond measure when a neighbour takes a core.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(args.threads)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(child: Any, question: str) -> Any:
    child.stdin.write(question + "\n")
    child.stdin.flush()
    if not (answer := child.stdout.readline()):
        raise SystemExit(f"a contender died at: {question}")
    return json.loads(answer)


def play(children: dict[str, Any], order: Sequence[str]) -> dict[str, float]:
    """One round: seconds of every piece of work, of each contender and of the machine at its limit."""
    seconds = {}
    for work in WORKS:
        for peer in order:
            seconds[f"{work}, {peer}"] = ask(children[peer], work)
        seconds[f"{work}, limit"] = ask(children[PEERS[0]], f"limit {work}")
    return seconds


def logit_difference(children: dict[str, Any]) -> float:
    """Largest difference, relative to the largest logit, over some decoded tokens."""
    ours, theirs = (ask(child, "logits") for child in children.values())
    pairs = [(a, b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True)]
    return max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs)


def render(medians: dict[str, float]) -> str:
    lines = [f"{'median':<14}{'ours':>12}{'Hugging Face':>15}{'faster by':>12}{'share of limit':>17}   (tokens/s)"]
    for work in WORKS:
        tokens = 1 if work == "decode" else int(work.split()[1])
        ours, theirs, limit = (medians[f"{work}, {name}"] for name in (*PEERS, "limit"))
        rates = f"{work:<14}{tokens / ours:>12.2f}{tokens / theirs:>15.2f}"
        lines.append(f"{rates}{theirs / ours:>11.2f}x{limit / ours:>17.0%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
