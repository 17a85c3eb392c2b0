"""Running the command line in tests: in this process for what is light, as a process for what a process shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from qwenspec.cli import app
from qwenspec.ir.lower import lower
from qwenspec.spec.load import load

ROOT = Path(__file__).parents[2]
QWEN3 = str(ROOT / "specs" / "qwen3.yaml")

TINY = """\
schema_version: 1
family: tiny
default_variant: tiny
architecture:
  vocab_size: 40
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  intermediate_size: 48
  max_position_embeddings: 128
  dtype: float32
  norm: {eps: 1.0e-6}
  attention: {head_dim: 16, qk_norm: per_head}
  rope: {theta: 10000.0}
variants:
  tiny: {}
  tiny-tied: {tie_word_embeddings: true}
  tiny-int8: {quantization: {scheme: int8}}
"""


def call(*arguments: str | Path) -> Result:
    """The command in this process; `stdout` and `stderr` apart."""
    return CliRunner().invoke(app, [*map(str, arguments)], prog_name="qwenspec")


def process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "qwenspec", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
        check=False,
    )


def on_terminal(*arguments: str, **environment: str) -> str:
    """What a terminal receives of stderr."""
    import pty

    leader, follower = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    command = [sys.executable, "-m", "qwenspec", *arguments]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=follower, env=clean | environment, check=False)
    os.close(follower)
    with os.fdopen(leader, "rb") as stream:
        return stream.read1(1 << 16).decode()


def data(result: Result | subprocess.CompletedProcess[str]) -> object:
    """stdout, which has to be one JSON document."""
    return json.loads(result.stdout)


def write_checkpoint(spec: Path, folder: Path) -> None:
    """Random weights of the spec's default variant, and a tokenizer of one token a letter, in a folder."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models

    random = np.random.default_rng(0)
    tensors = {
        source.tensor: random.standard_normal((source.rows, *param.shape[1:]), np.float32) / 4
        for param in lower(load(spec)).params()
        for source in param.sources
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    letters = {chr(ord("A") + i): i for i in range(40)}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"eos_token_id": 39}')
    template = "{% for message in messages %}A{{ message.content }}{% endfor %}B"
    (folder / "chat_template.jinja").write_text(template)
