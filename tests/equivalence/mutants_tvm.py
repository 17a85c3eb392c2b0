"""Planted mistakes in the TVM backend: templates, and the kernels that run on CPUs."""

from __future__ import annotations

from mutant import TVM, Mutant

TEMPLATES = f"{TVM}/templates"
DECODE = f"{TVM}/kernels/decode_attention.py"
PREFILL = f"{TVM}/kernels/prefill_attention.py"
PARTS = f"{TVM}/kernels/attention_parts.py"
PAGES = f"{TVM}/kernels/pages.py"
QKV = f"{TVM}/kernels/qkv.py"
ROWS = f"{TVM}/kernels/rows.py"
GEMM = f"{TVM}/kernels/gemm.py"

TVM_MUTANTS = (
    # --------------------------------------------------------------------------------------------- templates
    Mutant(
        "tvm_attention_reads_the_residual",
        f"{TEMPLATES}/layers.py.jinja",
        "x = self.attention(x, cache",
        "x = self.attention(residual, cache",
        "attention reads the norm",
    ),
    Mutant(
        "tvm_window_of_another_layer",
        f"{TEMPLATES}/attention.py.jinja",
        "self.window = config.layer_windows[index]",
        "self.window = config.layer_windows[index - 1]",
        "windows on the wrong layers (vllm#15705, #39514)",
    ),
    Mutant(
        "tvm_last_norm_forgets_the_residual",
        f"{TEMPLATES}/model.py.jinja",
        "x, _ = self.norm(x, residual)",
        "x, _ = self.norm(x)",
        "the last layer's output is a sum as well",
    ),
    Mutant(
        "tvm_prefill_gives_the_first_token",
        f"{TEMPLATES}/model.py.jinja",
        "x[x.shape[0] - 1, j]",
        "x[0, j]",
        "every method of the contract is compared",
    ),
    Mutant(
        "tvm_not_normalized",
        f"{TEMPLATES}/head.py.jinja",
        "return x / length.maximum(1e-12)",
        "return x",
        "a text-embedding model's vectors have length 1",
    ),
    # --------------------------------------------------------------------------------------------- attention
    Mutant(
        "tvm_decode_window",
        DECODE,
        "T.max(last + 1 - reach(sm_scale, window), 0)",
        "T.max(last - reach(sm_scale, window), 0)",
        "window off by one (transformers#39408, sglang#26147, vllm#9679)",
    ),
    Mutant(
        "tvm_decode_window_after_a_fork",
        DECODE,
        "last: T.let[T.int32] = q_positions[s] - first_positions[s]",
        "last: T.let[T.int32] = q_positions[s]",
        "the pages of a fork's beginning are a run of their own (vllm#7018)",
    ),
    Mutant(
        "tvm_decode_heads",
        DECODE,
        "T.cast(q[sequence, head * group + g, d]",
        "T.cast(q[sequence, g * num_kv_heads + head, d]",
        "query head h reads KV head h // group",
    ),
    Mutant(
        "tvm_decode_softmax_peak",
        DECODE,
        "T.max(peak[g], folded[0, 0])",
        "T.float32(0)",
        "shows where scores are large",
    ),
    Mutant(
        "tvm_decode_joins_totals",
        DECODE,
        "peak[1] += part_totals[split_indptr[s] + i, h] * weight",
        "peak[1] += part_totals[split_indptr[s] + i, h]",
        "shows beyond 256 keys",
    ),
    Mutant(
        "tvm_prefill_window",
        PREFILL,
        "near = key_place[key] > place[strip, lane] - seen",
        "near = key_place[key] >= place[strip, lane] - seen",
        "window off by one (transformers#39408, sglang#26147, vllm#9679)",
    ),
    Mutant(
        "tvm_prefill_sees_the_next_token",
        PREFILL,
        "return near & (key_place[key] <= place[strip, lane])",
        "return near & (key_place[key] <= place[strip, lane] + 1)",
        "shows where all positions are compared",
    ),
    Mutant(
        "tvm_prefill_blocks_not_rescaled",
        PREFILL,
        "total[strip, lane] = total[strip, lane] * shrink[lane]",
        "total[strip, lane] = total[strip, lane]",
        "shows beyond 64 keys",
    ),
    Mutant(
        "tvm_prefill_weighed_by_peak",
        PREFILL,
        "some, peak[strip, lane_r] + T.log2(sum_r),",
        "some, peak[strip, lane_r],",
        "prefill in chunks: the prefix and the chunk are joined (vllm#48271)",
    ),
    Mutant(
        "tvm_tree_sees_siblings",
        PREFILL,
        "(order[strip, lane] < key_last[key])",
        "(order[strip, lane] <= key_last[key])",
        "a token tree's branches do not see one another",
    ),
    Mutant(
        "tvm_last_page_read_whole",
        PARTS,
        "(pages - 1) * page_size + last_page_len, 0)",
        "pages * page_size, 0)",
        "NaN in unused pages (vllm#7018)",
    ),
    Mutant(
        "tvm_exp2_coefficient",
        PARTS,
        "2.40226509e-1",
        "2.4e-1",
        "an effect of 0.05 % on a softmax's weights",
    ),
    Mutant(
        "tvm_fork_copies_a_token_less",
        PAGES,
        "T.grid(2, num_kv_heads, length)",
        "T.grid(2, num_kv_heads, length - 1)",
        "a stale page (vllm#7018)",
    ),
    Mutant(
        "tvm_commit_moves_keys_only",
        PAGES,
        "for part, h in T.grid(2, num_kv_heads):",
        "for part, h in T.grid(1, num_kv_heads):",
        "the values of a rejected branch stay",
    ),
    # ---------------------------------------------------------------------------------- between the products
    Mutant(
        "tvm_rope_of_the_first_token",
        QKV,
        "frequency = inv_freq[token, i] if DYNAMIC_ROPE else inv_freq[i]",
        "frequency = inv_freq[0, i] if DYNAMIC_ROPE else inv_freq[i]",
        "batch composition (vllm#48271, #9567)",
    ),
    Mutant(
        "tvm_logn_on_the_rotary_part",
        QKV,
        "store(out, row, i, load(x, x_row, i) * scale if LOGN else load(x, x_row, i))",
        "store(out, row, i, load(x, x_row, i))",
        "shows with LogN and partial rotary together",
    ),
    Mutant(
        "tvm_keys_normed_as_queries",
        QKV,
        "normalize(qkv, row, k_norm, normalized, (), eps, lanes)",
        "normalize(qkv, row, q_norm, normalized, (), eps, lanes)",
        "two norms, two weights",
    ),
    Mutant(
        "tvm_norm_eps_dropped",
        ROWS,
        "T.rsqrt(total[0] / float(size) + eps)",
        "T.rsqrt(total[0] / float(size))",
        "shows where eps is not small beside the mean square",
    ),
    Mutant(
        "tvm_one_plus_ignored",
        ROWS,
        "scaled = unit * (1.0 + w) if ONE_PLUS else rounded(unit, x.dtype) * w",
        "scaled = rounded(unit, x.dtype) * w",
        "a norm's weight is plain or 1 + w (llama.cpp#16095)",
    ),
    Mutant(
        "tvm_gelu_tanh_constant",
        f"{TVM}/kernels/activation.py",
        "T.float32(0.044715)",
        "T.float32(0.044)",
        "an effect of 0.1 %",
    ),
    # ---------------------------------------------------------------------------------------------- products
    Mutant(
        "tvm_pack_from_the_first_lane",
        f"{TVM}/kernels/panels.py",
        "packed[panel, :, lane : lane + count] = rows[:count].T",
        "packed[panel, :, :count] = rows[:count].T",
        "parts that do not fill panels (vllm#41021)",
    ),
    Mutant(
        "tvm_gemm_last_row",
        GEMM,
        "T.serial(T.min(tile, n - (first_tile + t) * tile)) as r",
        "T.serial(T.min(tile, n - 1 - (first_tile + t) * tile)) as r",
        "the rows of a tile that is not full",
    ),
    Mutant(
        "tvm_gemv_last_inputs",
        GEMM,
        "in product(range(sizes.group), range(parts * part, inputs)):",
        "in product(range(sizes.group), range(inputs, inputs)):",
        "shows where inputs do not divide by 4, in decode (vllm#48271)",
    ),
    Mutant(
        "tvm_gemm_second_block",
        GEMM,
        "store(lambda new, old: old + new)",
        "store(lambda new, old: new)",
        "shows beyond 512 inputs",
    ),
    Mutant(
        "tvm_bias_of_the_first_panel",
        GEMM,
        "value(j) + float32(bias[first + j])",
        "value(j) + float32(bias[j])",
        "shows beyond the first panel's outputs",
    ),
)
