"""Hugging Face transformers as a contender, for specs that its configs can say.

It computes in float32, with quantised weights dequantised: on a CPU it runs no quantised format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwenspec.diagnostics import SpecError
from qwenspec.hf.exporter import export_config
from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Fp8, Fp8Block
from qwenspec.spec.rope import Dynamic, DynamicQwen1, LongRope
from qwenspec.verify.contenders import Rows
from qwenspec.verify.steps import Add, Commit, Fork, Forward, Popn, Remove, Restart, Step, path


def obstacle(spec: Spec) -> str | None:
    """Why Hugging Face cannot be compared, or None.

    Where RoPE follows the length, it computes a sequence otherwise when it comes in parts than as a whole."""
    if spec.architecture.checkpoint.layout == "qwen1":
        return "transformers has no class for Qwen-1"
    if isinstance(spec.architecture.rope.scaling, Dynamic | DynamicQwen1 | LongRope):
        return "its rotary frequencies follow the whole batch's length"
    if isinstance(spec.quantization, Fp8Block | Fp8) and spec.quantization.activations != "none":
        return "it rounds no activations to FP8 on a CPU"
    if spec.kv_cache is not None:
        return "it caches keys and values as they are"
    try:
        export_config(spec.model_copy(update={"quantization": None}))
    except SpecError as error:
        return "; ".join(diagnostic.message for diagnostic in error.diagnostics)
    return None


class HuggingFaceContender:
    """Every forward computes its sequences from their first token on, without a cache."""

    name = "huggingface"

    def __init__(self, spec: Spec, folder: Path) -> None:
        """A checkpoint folder with config.json; in float32."""
        import torch
        import transformers

        quiet: Callable[[], None] = transformers.utils.logging.disable_progress_bar
        quiet()
        embedding = spec.architecture.embedding
        auto = transformers.AutoModelForCausalLM if embedding is None else transformers.AutoModel
        self._model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self._embedding = embedding
        self._tokens: dict[int, list[int]] = {}
        self._waiting: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # tokens and parents of trees

    def do(self, step: Step) -> Rows | None:
        match step:
            case Forward():
                return self._forward(step)[step.rows]
            case Restart():
                self._tokens, self._waiting = {}, {}
            case Add(seq):
                self._tokens[seq] = []
            case Commit(leaves):
                for seq, leaf in leaves.items():
                    ids, parents = self._waiting[seq]
                    self._tokens[seq] = self._tokens[seq] + [ids[node] for node in path(parents, leaf)]
                self._waiting = {}
            case Fork(parent, child, at):
                self._tokens[child] = self._tokens[parent][:at]
            case Popn(seq, n):
                self._tokens[seq] = self._tokens[seq][: len(self._tokens[seq]) - n]
            case Remove(seq):
                del self._tokens[seq]
        return None

    def taps(self, step: Forward) -> Mapping[str, Rows]:
        return {"logits": self._forward(step)}

    def _forward(self, step: Forward) -> Rows:
        rows: list[npt.NDArray[np.float32]] = []
        for seq, ids in step.tokens.items():
            before = self._tokens[seq]
            if step.trees is None:
                self._tokens[seq] = before + list(ids)
                rows.append(self._logits(self._tokens[seq])[len(before) :])
            else:
                parents = step.trees[seq]
                self._waiting[seq] = ids, parents
                for leaf in range(len(ids)):
                    own = [ids[node] for node in path(parents, leaf)]
                    rows.append(self._logits(before + own)[-1:])
        return np.concatenate(rows)

    def _logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        import torch
        from torch.nn.functional import normalize

        with torch.inference_mode():
            found = self._model(torch.tensor([ids]), use_cache=False)
        if self._embedding is None:
            rows = found.logits[0]
        else:
            states = found.last_hidden_state[0]
            rows = normalize(states, dim=-1) if self._embedding.normalize else states
        array: npt.NDArray[np.float32] = rows.numpy()
        return array
