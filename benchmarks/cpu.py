"""Generated packages on CPU, beside Hugging Face and what the machine can do: python benchmarks/cpu.py.

Both backends' packages are generated from a spec, and all contenders read the same random checkpoint, or what
`qwenspec convert` makes of it. Each is a process of its own; rounds alternate between them, so that all meet the same
neighbours on the machine. The limits are measured in the same rounds: reading the weights once for a decoded token, the
matrix products at torch's best rate for a prefill. A floor is the time to read as many bytes as a contender's own
weights are. In the end TVM's compile times are measured, of the whole model and of one with 4 layers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qwenspec
from qwenspec.convert.convert import Request, convert
from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Int4, Int8

ROOT = Path(__file__).resolve().parents[1]
QUANTIZED = {
    "tvm int8": Int8(scheme="int8"),
    "tvm int4": Int4(scheme="int4"),
    "tvm int4, int4 head": Int4(scheme="int4", head="int4"),
}
CONTENDERS = ("triton", "tvm", "hugging face", "tvm float16", "tvm bfloat16", *QUANTIZED)
WORKS = ("decode", "prefill 128", "prefill 512")
# Of the largest logit, over a few decoded tokens.
TOLERANCES = {"float16": 1e-2, "bfloat16": 1e-1, "int8": 0.3, "int4": 1.0, "int4, int4 head": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="specs/qwen3.yaml")
    parser.add_argument("--variant", default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, help="fewer than the variant has, for a quick look")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--verify", action="store_true", help="first compare all models' logits")
    parser.add_argument("--no-compile", action="store_true", help="leave the compile times out")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = shortened(args.spec, args.variant, args.layers, folder)
        packages = {backend: qwenspec.emit(spec, backend, folder) for backend in ("triton", "tvm")}
        seconds, bytes_read = race(spec, packages, folder / "checkpoint", args)
        compiled = {} if args.no_compile else compile_times(args, folder)
    if args.json:
        print(json.dumps({"rounds": seconds, "bytes": bytes_read, "compile": compiled}, indent=1))
    else:
        medians = {name: median(r[name] for r in seconds) for name in seconds[0]}
        print(render(medians, bytes_read, args.contenders))
        for layers, (whole, compile_alone) in compiled.items():
            print(f"tvm, {layers} layers: compiled in {compile_alone:.1f} s; {whole:.1f} s with start and linking")
    return 0


def shortened(spec: str, variant: str, layers: int | None, folder: Path) -> Spec:
    """The variant, with fewer layers if asked."""
    if layers is None:
        return qwenspec.load(spec, variant=variant)
    file = folder / f"layers-{layers}.yaml"
    file.write_text(
        f"schema_version: 1\nfamily: {variant}-{layers}-layers\nextends: {Path(spec).resolve()}#{variant}\n"
        f"architecture: {{num_hidden_layers: {layers}}}\n"
    )
    return qwenspec.load(file)


# ---------------------------------------------------------------------------------------------- the contenders


def race(
    spec: Spec, packages: dict[str, Path], checkpoint: Path, args: argparse.Namespace
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Of each round, the seconds of every piece of work, of each contender and of the machine at its limit; and the
    bytes of weights that each reads for a token."""
    limits = start("limits", packages["triton"], checkpoint, args.threads)
    ask(limits, "checkpoint")
    peers = {}
    for name in args.contenders:
        package, weights = packages["tvm" if name.startswith("tvm") else "triton"], checkpoint
        if name in QUANTIZED:
            package, weights = quantized(spec, name, checkpoint)
        peers[name] = start(name, package, weights, args.threads)
    bytes_read = {name: ask(peer, "bytes") for name, peer in {**peers, "limit": limits}.items()}
    try:
        if args.verify:
            verify(peers)
        play(peers, limits)  # warms up
        rounds = []
        for i in range(args.rounds):
            order = list(peers)[:: 1 if i % 2 else -1]
            rounds.append(play({name: peers[name] for name in order}, limits))
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
    finally:
        for peer in (*peers.values(), limits):
            peer.stdin.close()
            peer.wait()
    return rounds, bytes_read


def quantized(spec: Spec, name: str, checkpoint: Path) -> tuple[Path, Path]:
    """A quantised contender's package and checkpoint."""
    folder = checkpoint.parent / name.replace(", ", "_").replace(" ", "_")
    request = Request(checkpoint, spec, QUANTIZED[name], folder / "checkpoint")
    folder.mkdir()
    convert(request)
    return qwenspec.emit(request.result, "tvm", folder), request.out


def start(name: str, package: Path, checkpoint: Path, threads: int) -> Any:
    """A contender in a new process, to be driven line by line."""
    command = [sys.executable, str(ROOT / "benchmarks" / "cpu_peer.py"), name, str(package), str(checkpoint)]
    # Barriers that spin are slow beyond measure when a neighbour takes a core.
    environment = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads), "TVM_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )


def ask(peer: Any, question: str) -> Any:
    peer.stdin.write(question + "\n")
    peer.stdin.flush()
    if not (answer := peer.stdout.readline()):
        raise SystemExit(f"a contender died at: {question}")
    return json.loads(answer)


def play(peers: dict[str, Any], limits: Any) -> dict[str, float]:
    """One round."""
    seconds = {}
    for work in WORKS:
        for name, peer in peers.items():
            seconds[f"{work}, {name}"] = ask(peer, work)
        seconds[f"{work}, limit"] = ask(limits, work)
    return seconds


def verify(peers: dict[str, Any]) -> None:
    """Exits unless all decode the same tokens' logits as the first contender, but for rounding."""
    logits = {name: ask(peer, "logits") for name, peer in peers.items()}
    first, expected = next(iter(logits.items()))
    largest = max(abs(value) for row in expected for value in row)
    for name, rows in logits.items():
        pairs = ((a, b) for row, other in zip(rows, expected, strict=True) for a, b in zip(row, other, strict=True))
        difference = max(abs(a - b) for a, b in pairs) / largest
        print(f"{name}: {difference:.1e} of the largest logit from {first}", file=sys.stderr)
        if difference > TOLERANCES.get(name.removeprefix("tvm "), 1e-4):
            raise SystemExit("the models disagree")


def compile_times(args: argparse.Namespace, folder: Path) -> dict[int, tuple[float, float]]:
    """Layers -> seconds of `python -m PACKAGE.build` in a new process: all of it, and what it says of compiling."""
    found = {}
    for layers in dict.fromkeys((4, args.layers)):
        spec = shortened(args.spec, args.variant, layers, folder)
        package = qwenspec.emit(spec, "tvm", folder / "compile")
        command = [sys.executable, "-m", f"{package.name}.build", "--dtype", "float32", "-o", f"{package}.so"]
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=package.parent, check=True, capture_output=True, text=True)
        whole = time.perf_counter() - begin
        compile_alone = float(done.stdout.split("compiled in ")[1].split()[0])
        found[spec.architecture.num_hidden_layers] = whole, compile_alone
    return found


def render(medians: dict[str, float], bytes_read: dict[str, int], contenders: list[str]) -> str:
    """Tokens a second; the share of the limit in float32, and of a contender's floor; how often another's rate."""
    lines = []
    for work in WORKS:
        tokens = 1 if work == "decode" else int(work.split()[1])
        limit = medians[f"{work}, limit"]
        lines.append(f"{work}: the machine's limit in float32 is {tokens / limit:.2f} tokens/s")
        for name in contenders:
            ours = medians[f"{work}, {name}"]
            line = f"  {name:<20}{tokens / ours:>9.2f} tokens/s{limit / ours:>8.0%} of the limit"
            if work == "decode":
                line += f"{limit * bytes_read[name] / bytes_read['limit'] / ours:>8.0%} of its floor"
            for other in ("hugging face", "triton", "tvm"):
                if other in contenders and other != name:
                    line += f"{medians[f'{work}, {other}'] / ours:>8.2f} x {other}"
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
