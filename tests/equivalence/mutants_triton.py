"""Planted mistakes in the Triton backend: templates, the kernels' PyTorch paths, and the kernels themselves."""

from __future__ import annotations

from mutant import TRITON, Mutant

TEMPLATES = f"{TRITON}/templates"
DECODE = f"{TRITON}/kernels/decode_attention.py"
PREFILL = f"{TRITON}/kernels/prefill_attention.py"
PAGED = f"{TRITON}/kernels/paged.py"
QKV = f"{TRITON}/kernels/qkv.py"
NORM = f"{TRITON}/kernels/norm.py"
ACTIVATION = f"{TRITON}/kernels/activation.py"
LINEAR = f"{TRITON}/kernels/linear.py"

TRITON_MUTANTS = (
    # --------------------------------------------------------------------------------------------- templates
    Mutant(
        "triton_residual_twice",
        f"{TEMPLATES}/layers.py.jinja",
        "return self.mlp(x), residual",
        "return self.mlp(x) + residual, residual",
        "the residual is added once",
    ),
    Mutant(
        "triton_post_norm_is_input_norm",
        f"{TEMPLATES}/layers.py.jinja",
        "x, residual = self.post_attention_norm(x, residual)",
        "x, residual = self.input_norm(x, residual)",
        "each norm has its own weight",
    ),
    Mutant(
        "triton_window_of_layer_0",
        f"{TEMPLATES}/layers.py.jinja",
        ", config.layer_windows[index]",
        ", config.layer_windows[0]",
        "windows on the wrong layers (transformers#35896, #40126)",
    ),
    Mutant(
        "triton_not_normalized",
        f"{TEMPLATES}/head.py.jinja",
        "F.normalize(x.float(), dim=-1)",
        "x.float()",
        "a text-embedding model's vectors have length 1",
    ),
    Mutant(
        "triton_head_input_not_cast",
        f"{TEMPLATES}/head.py.jinja",
        "logits = linear(x.to(torch.{{ head_dtype }}), self.embed_tokens",
        "logits = linear(x, self.embed_tokens",
        "shows where a tied head has a dtype of its own",
    ),
    Mutant(
        "triton_attention_factor_on_cos_only",
        f"{TEMPLATES}/rope.py.jinja",
        "(angles.sin() * attention_factor).to(dtype)",
        "angles.sin().to(dtype)",
        "the factor is of both (vllm#48351)",
    ),
    Mutant(
        "triton_logn_a_token_late",
        f"{TEMPLATES}/model.py.jinja",
        "torch.log(batch.positions.float() + 1)",
        "torch.log(batch.positions.float())",
        "positions count from 0, lengths from 1: an effect of 1 %",
    ),
    Mutant(
        "triton_prefill_gives_the_first_token",
        f"{TEMPLATES}/contract.py.jinja",
        "return self.head(x[-1:])[None]",
        "return self.head(x[:1])[None]",
        "every method of the contract is compared",
    ),
    # ------------------------------------------------------------------------------------------ PyTorch paths
    Mutant(
        "triton_decode_window",
        DECODE,
        "start = max(length - window, 0) if SLIDING else 0",
        "start = max(length - window - 1, 0) if SLIDING else 0",
        "window off by one (transformers#39408, sglang#26147, vllm#9679)",
    ),
    Mutant(
        "triton_decode_heads",
        DECODE,
        "group = q[i].view(1, kv_heads, -1, q.shape[-1])",
        "group = q[i].view(1, -1, kv_heads, q.shape[-1]).transpose(1, 2)",
        "query head h reads KV head h // group",
    ),
    Mutant(
        "triton_decode_scale",
        DECODE,
        "v.unsqueeze(0), scale=scale)",
        "v.unsqueeze(0))",
        "shows where a spec has a scale of its own",
    ),
    Mutant(
        "triton_prefill_window",
        PREFILL,
        "mask &= key > query - window",
        "mask &= key >= query - window",
        "window off by one (transformers#39408, sglang#26147, vllm#9679)",
    ),
    Mutant(
        "triton_prefill_sees_the_next_token",
        PREFILL,
        "mask = key <= query\n",
        "mask = key <= query + 1\n",
        "shows where all positions are compared",
    ),
    Mutant(
        "triton_prefill_block_starts_late",
        PREFILL,
        "first = max(block - window + 1, 0) if SLIDING",
        "first = max(block - window + 2, 0) if SLIDING",
        "a chunk's first query loses a key at the window's edge (sglang#26147)",
    ),
    Mutant(
        "triton_prefill_second_block",
        PREFILL,
        "torch.arange(block, stop).unsqueeze(1)",
        "torch.arange(prefix, prefix + stop - block).unsqueeze(1)",
        "shows in a chunk of more than 64 tokens",
    ),
    Mutant(
        "triton_tree_sees_siblings",
        PREFILL,
        "(first <= order) & (order < last)",
        "(first <= order) & (order <= last)",
        "a token tree's branches do not see one another",
    ),
    Mutant(
        "triton_tree_window_in_order",
        PREFILL,
        "return torch.where(token < prefix, token, prefix + nodes[(token - prefix).clamp(min=0), 0])",
        "return token",
        "a window counts positions, not nodes (sglang#26147)",
    ),
    Mutant(
        "triton_pages_taken_for_a_row",
        PAGED,
        "if numbers == list(range(first, first + count)):",
        "if numbers[-1] == first + count - 1:",
        "pages in any order (vllm#7018)",
    ),
    Mutant(
        "triton_rope_interleaved",
        QKV,
        "first, second = x[..., :half], x[..., half : 2 * half]",
        "first, second = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]",
        "pairs are (i, i + d/2)",
    ),
    Mutant(
        "triton_logn_on_keys",
        QKV,
        "qk[:, :heads] *= query_scale.view(-1, 1, 1)",
        "qk *= query_scale.view(-1, 1, 1)",
        "LogN is of queries alone",
    ),
    Mutant(
        "triton_one_plus_not_on_keys",
        QKV,
        "unit[:, heads:] *= 1.0 + k_weight.float() if ONE_PLUS else k_weight",
        "unit[:, heads:] *= k_weight",
        "a norm's weight is plain or 1 + w (llama.cpp#16095)",
    ),
    Mutant(
        "triton_norm_eps_in_code",
        NORM,
        "return F.rms_norm(x, weight.shape, None, eps) * weight",
        "return F.rms_norm(x, weight.shape, None, 1e-6) * weight",
        "a family's default hidden in code (transformers#41151)",
    ),
    Mutant(
        "triton_up_activated",
        ACTIVATION,
        "gate, up = gate_up.split(size, dim=-1)",
        "up, gate = gate_up.split(size, dim=-1)",
        "the gate is activated",
    ),
    Mutant(
        "triton_gelu_is_tanh",
        ACTIVATION,
        "return F.gelu(gate)\n",
        'return F.gelu(gate, approximate="tanh")\n',
        "two functions of nearly the same values",
    ),
    Mutant(
        "triton_bias_dropped_in_float32",
        LINEAR,
        'return _onednn(x, weight, bias, "none", [], "")',
        'return _onednn(x, weight, None, "none", [], "")',
        "one of two products",
    ),
    Mutant(
        "triton_bias_dropped_in_16_bits",
        LINEAR,
        "return F.linear(x, weight, bias)",
        "return F.linear(x, weight)",
        "one of two products",
    ),
    # ------------------------------------------------------------------------------------------------ kernels
    Mutant(
        "kernel_decode_window",
        DECODE,
        "visible = visible & (position >= kv_len - window)",
        "visible = visible & (position > kv_len - window)",
        "window off by one (transformers#39408, sglang#26147, vllm#9679)",
        interpreted=True,
    ),
    Mutant(
        "kernel_decode_softmax_peak",
        DECODE,
        "new_peak = tl.maximum(peak, tl.max(scores, 1))",
        "new_peak = tl.zeros_like(peak)",
        "shows where scores are large",
        interpreted=True,
    ),
    Mutant(
        "kernel_decode_joins_by_peak",
        DECODE,
        "tl.where(total > 0, peak + tl.log2(total), -float(",
        "tl.where(total > 0, peak, -float(",
        "shows where a sequence's keys are split among programs",
        interpreted=True,
    ),
    Mutant(
        "kernel_prefill_window",
        PREFILL,
        "visible = visible & (position[None, :] > query[:, None] - window)",
        "visible = visible & (position[None, :] >= query[:, None] - window)",
        "window off by one (transformers#39408, sglang#26147, vllm#9679)",
        interpreted=True,
    ),
    Mutant(
        "kernel_prefill_positions",
        PREFILL,
        "query = kv_len - q_len + m\n",
        "query = m\n",
        "a chunk's position (vllm#48271, #9567)",
        interpreted=True,
    ),
    Mutant(
        "kernel_prefill_heads",
        PREFILL,
        "kv_head = head // (HEADS // KV_HEADS)",
        "kv_head = head % KV_HEADS",
        "query head h reads KV head h // group",
        interpreted=True,
    ),
    Mutant(
        "kernel_prefill_log2_e",
        PREFILL,
        "(scale * 1.4426950408889634)",
        "(scale * 1.44)",
        "an effect of 0.2 % on the scores",
        interpreted=True,
    ),
    Mutant(
        "kernel_tree_sees_siblings",
        PREFILL,
        "(order[:, None] - first[None, :]).to(tl.uint32) < size[None, :]",
        "(order[:, None] - first[None, :]).to(tl.uint32) <= size[None, :]",
        "a token tree's branches do not see one another",
        interpreted=True,
    ),
    Mutant(
        "kernel_norm_eps_outside_root",
        NORM,
        "tl.rsqrt(tl.sum(x32 * x32, 0) / size + eps)",
        "(tl.rsqrt(tl.sum(x32 * x32, 0) / size) + eps)",
        "eps is added to the mean square",
        interpreted=True,
    ),
    Mutant(
        "kernel_qk_norm_of_rotary_part",
        QKV,
        "squares += tl.sum(rest * rest, 1)",
        "squares += 0.0",
        "shows with QK-norm and partial rotary together",
        interpreted=True,
    ),
    Mutant(
        "kernel_rotary_on_queries_only",
        QKV,
        "turned_first = first * cos - second * sin\n    turned_second = second * cos + first * sin",
        "turned_first = tl.where(is_q[:, None], first * cos - second * sin, first)\n"
        "    turned_second = tl.where(is_q[:, None], second * cos + first * sin, second)",
        "keys rotate too; position 0 hides it",
        interpreted=True,
    ),
    Mutant(
        "kernel_gelu_constant",
        ACTIVATION,
        "tl.erf(x * 0.7071067811865476)",
        "tl.erf(x * 0.7)",
        "an effect of less than 1 %",
        interpreted=True,
    ),
)
