"""Check and time the generated packages on a GPU: python tests/gpu/run.py.

Needs torch, Triton, numpy, safetensors and transformers, no network, and not qwenspec: it runs the packages in
generated/. Exit codes: 0 all right, 1 a result is wrong (with --strict: or a speed goal is missed), 3 no GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import ROOT, correctness, speed
from gpu.report import Report

SECTIONS = ("kernels", "packages", "graphs", "speed", "profile")
# QK-norm and a tied head; biases and a head of its own; Qwen-1's tensor names.
PARITY = ("qwen3_0_6b_triton", "qwen2_5_7b_instruct_triton", "qwen_7b_triton")
SPEED = ("qwen3_0_6b_triton", "qwen3_4b_triton", "qwen3_8b_triton")
GOAL = ("qwen3_4b_triton", "qwen3_8b_triton")  # decode at batch 1 at 70% of the memory bandwidth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS[:-1]), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="toy sizes, and no compiled Hugging Face")
    parser.add_argument("--strict", action="store_true", help="a missed speed goal is a failure too")
    parser.add_argument("--device", default="cuda", help="cpu runs what can run there, to test this script")
    parser.add_argument("--packages", type=Path, default=ROOT / "generated", help="folder of generated packages")
    parser.add_argument("--compile-seconds", type=int, default=240, help="for all of Hugging Face's models together")
    parser.add_argument("--out", type=Path, help="write everything as JSON too")
    args = parser.parse_args()
    wanted = args.sections.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    missing = [name for name in {*PARITY, *SPEED} if not (args.packages / name).is_dir()]
    if missing:
        parser.error(f"{args.packages} lacks {', '.join(sorted(missing))}: qwenspec gen --all")

    if args.device == "cuda" and not torch.cuda.is_available():
        print("tests/gpu: PyTorch sees no CUDA device here; nothing was run", file=sys.stderr)
        return 3
    return run(args, wanted, torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device))


def run(args: argparse.Namespace, wanted: list[str], device: torch.device) -> int:
    report, start = Report(), time.monotonic()
    print(machine := describe(device))
    plan = speed.Plan(args.quick, 0 if args.quick else args.compile_seconds)
    parity, timed = ([args.packages / name for name in names] for names in (PARITY, SPEED))
    sections: dict[str, Callable[[], None]] = {
        "kernels": lambda: correctness.kernels(report, device),
        "packages": lambda: correctness.packages(report, device, parity, args.quick),
        "graphs": lambda: correctness.graphs(report, device, parity[0]),
        "speed": lambda: speed.table(report, device, timed, GOAL, plan),
        "profile": lambda: speed.profile(report, device, timed, plan),
    }
    for name in wanted:
        if name in ("graphs", "profile") and device.type != "cuda":
            report.table(name, "skipped")
            report.row("it needs a CUDA device")
            continue
        try:
            sections[name]()
        except Exception as error:  # the other sections still have something to say
            traceback.print_exc()
            report.failures.append(f"{name}: {type(error).__name__}: {error}")
    took = time.monotonic() - start
    for kind, found in (("WRONG", report.failures), ("MISS", report.misses)):
        for line in found:
            print(f"{kind}: {line}")
    print(f"\n{len(report.failures)} wrong, {len(report.misses)} goals missed, in {took:.0f} s")
    if args.out:
        data = {"machine": machine, "seconds": took, "sections": report.sections}
        args.out.write_text(json.dumps(data | {"failures": report.failures, "misses": report.misses}, indent=1))
    return 1 if report.failures or (args.strict and report.misses) else 0


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return f"{name}; torch {torch.__version__}, Triton {triton_version}, transformers {transformers.__version__}"


if __name__ == "__main__":
    sys.exit(main())
