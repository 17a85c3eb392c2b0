"""Quantisations that people have and that are not read, with the way out."""

from __future__ import annotations

from qwenspec.hf.config import Config

WAY_OUT = "take the checkpoint in full precision; `qwenspec convert` rounds it to int4 or int8"
REASONS = {
    "bitsandbytes": "bitsandbytes packs weights as its own kernels for one GPU read them",
    "hqq": "HQQ's weights are packed in its own classes",
    "gguf": "GGUF's blocks are not read",
    "torchao": "torchao's weights are pickled classes",
}


def reported(quantized: Config) -> bool:
    """Whether the `quantization_config` has such a method; then it is in the report."""
    method = quantized.tree.get("quant_method")
    if method is None and any(key.removeprefix("_") in ("load_in_4bit", "load_in_8bit") for key in quantized.tree):
        method = "bitsandbytes"  # as transformers 4.30 wrote it
    reason = REASONS.get(method) if isinstance(method, str) else None
    if reason is None:
        return False
    quantized.error("unsupported-quantization", f"{method} is not supported: {reason}", "quant_method", WAY_OUT)
    quantized.unread.clear()
    return True
