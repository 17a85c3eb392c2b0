"""Planted mistakes in quantised KV caches."""

from __future__ import annotations

from mutant import TRITON, TVM, Mutant

KV = f"{TRITON}/kernels/quantized_kv.py"
CACHE = f"{TRITON}/runtime/cache.py"
QKV = f"{TRITON}/kernels/qkv.py"
ENTRIES = f"{TVM}/kernels/kv_entries.py"

KV_MUTANTS = (
    Mutant("triton_key_scales_unused", KV, "@ k.mT * (scale * k_scale)", "@ k.mT * scale", "scale unused (vllm#41343)"),
    Mutant(
        "triton_value_scales_unused", KV, "(scores.softmax(-1) * v_scale) @ v", "scores.softmax(-1) @ v", "scale unused"
    ),
    Mutant(
        "triton_key_scales_for_values",
        KV,
        "kv.k[:, tokens], kv.v[:, tokens], kv.k_scale, kv.v_scale",
        "kv.k[:, tokens], kv.v[:, tokens], kv.k_scale, kv.k_scale",
        "scale of the wrong part",
    ),
    Mutant(
        "triton_copied_pages_lose_their_scales",
        CACHE,
        "self.scales[:, :, new] = self.scales[:, :, old]",
        "pass",
        "a fork's half-filled page",
    ),
    Mutant(
        "triton_accepted_tokens_lose_their_scales",
        CACHE,
        "scales[:, :, targets] = scales[:, :, sources]",
        "pass",
        "token trees",
    ),
    Mutant(
        "tvm_entry_scale_unused",
        ENTRIES,
        'return scale * T.float32(256) if KV_DTYPE == "fp8_e4m3" else scale',
        "return T.float32(1)",
        "scale unused",
    ),
    Mutant(
        "tvm_stored_key_scale_unused",
        ENTRIES,
        "query * attention_scale(k_scale) if STORED_KV_SCALES else query",
        "query * T.float32(256) if STORED_KV_SCALES else query",
        "scale unused",
    ),
    Mutant(
        "tvm_stored_scales_swapped",
        ENTRIES,
        "T.Select(head < num_cached // 2, k_scale[0], v_scale[0])",
        "T.Select(head < num_cached // 2, v_scale[0], k_scale[0])",
        "scale of the wrong part",
    ),
    Mutant(
        "tvm_quantised_queries_of_one_head",
        ENTRIES,
        "strides = [int(count * size) // 4, head_dim, 1]",
        "strides = [int(count * size) // 4, head_dim - 1, 1]",
        "where queries lie in the entries",
    ),
)
