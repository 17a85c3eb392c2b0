"""Compile this package into a library: python -m <this package>.build --device cpu --dtype float32 -o model.so.

With --tp N it is for N ranks that share the model, and the same on each of them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from .config import Config
from .console import ended
from .library import DTYPES, HERE, compile_library, title, write_library
from .shares import explanation, obstacles, read_shared
from .targets import BuildError, find_target


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.build", description="Compile this package.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:sm_90, a TVM target tag or target JSON")
    parser.add_argument("--dtype", choices=DTYPES, default=Config().dtype, help="default: %(default)s")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that share the model (default: 1)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the library, model.so")
    args = parser.parse_args()
    return ended(lambda: build(args.device, args.dtype, args.output, args.tp), BuildError)


def build(device: str, dtype: str, output: Path, degree: int = 1) -> None:
    """Compiles for a device or target (see find_target) and `degree` ranks, and says what came out."""
    parameters = read_shared(json.loads((HERE / "MANIFEST.json").read_text())["parameters"])
    if reasons := obstacles(parameters, degree):
        raise BuildError(f"{degree} ranks cannot share this model: {'; '.join(reasons)}; {explanation(parameters)}")
    start = time.perf_counter()
    executable, metadata = compile_library(find_target(device), dtype, degree)
    compiled = time.perf_counter()
    write_library(executable, metadata, output)
    linked = time.perf_counter()
    print(f"{metadata['variant']} in {dtype} for {title(metadata)}: {output}, {output.stat().st_size / 1e6:.2f} MB")
    print(f"compiled in {compiled - start:.1f} s, linked in {linked - compiled:.1f} s")
    print(f"functions: {', '.join(metadata['methods'])}")


if __name__ == "__main__":
    sys.exit(main())
