"""Attention of one new token a sequence over its paged keys and values on CPUs, as scheduled TIR.

Each sequence's keys are split, so that a few sequences keep many cores busy; the splits' results are joined
afterwards. The query heads that share a KV head go together: keys and values are read from memory once.
"""

from functools import cache
from math import gcd
from operator import add

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from .attention_parts import LOG2_E, NO_KEY, copy_row, exp2, fold, num_keys, reach
from .kv_entries import floats
from .kv_layout import entry_size, query_entries

QUANTIZED_KV = False  # flag: keys and values are cached quantised
SPLIT = 256  # keys
KEYS = 16  # of a block
STEP = 4  # keys, scored at once


@cache
def decode_attention(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, window: int | None, lanes: int
) -> PrimFunc:
    """The function for the cache's slot of decode attention, over keys in pages, the new token's among them.

    With sm_scale < 0 a token at position p sees only p - window + 1 and later, and the scale is -sm_scale.
    Writes softmax(scale · q Kᵀ) V and the log2 of the softmax's sum; 0 and -inf for a row without keys.
    [QUANTIZED_KV] dtype: of the entries that everything lies in
    """
    if QUANTIZED_KV:
        carriers, entry = query_entries(num_heads, head_dim), entry_size(head_dim)
    group = num_heads // num_kv_heads
    heads = min(group, 2)  # of the group, at once: an element of a key in a register serves both
    rows = -(-group // heads) * heads
    chunks = -(-head_dim // lanes)
    dims = chunks * lanes
    span = gcd(chunks, 4) * lanes  # of a value, at once

    @T.inline
    def score(k, queries, scores, keys):
        for j0, g0 in T.grid(KEYS // STEP, rows // heads):
            sums = T.alloc_buffer((STEP * heads, lanes), "float32", scope="local")
            for i in T.unroll(STEP * heads):
                for lane in T.vectorized(lanes):
                    sums[i, lane] = T.float32(0)
            for c in T.serial(chunks):
                for i in T.unroll(STEP * heads):
                    for lane in T.vectorized(lanes):
                        sums[i, lane] += (
                            k[j0 * STEP + i // heads, c * lanes + lane]
                            * queries[g0 * heads + i % heads, c * lanes + lane]
                        )
            for i in T.unroll(STEP * heads):
                fold(sums, i, lanes, add)
                scores[g0 * heads + i % heads, j0 * STEP + i // heads] = T.Select(
                    j0 * STEP + i // heads < keys, sums[i, 0], T.float32(-float("inf"))
                )

    @T.inline
    def weigh(scores, shrink, peak, total):
        for g in T.serial(rows):
            folded = T.alloc_buffer((1, KEYS), "float32", scope="local")
            for j in T.vectorized(KEYS):
                folded[0, j] = scores[g, j]
            fold(folded, 0, KEYS, T.max)
            top: T.let[T.float32] = T.max(peak[g], folded[0, 0])
            shrink[g] = exp2(peak[g] - top)
            peak[g] = top
            for j in T.vectorized(KEYS):
                folded[0, j] = exp2(scores[g, j] - top)
            for j in T.vectorized(KEYS):
                scores[g, j] = folded[0, j]
            fold(folded, 0, KEYS, add)
            total[g] = total[g] * shrink[g] + folded[0, 0]

    @T.inline
    def accumulate(v, scores, shrink, outs):
        for g0, c in T.grid(rows // heads, dims // span):
            sums = T.alloc_buffer((heads, span), "float32", scope="local")
            for g in T.unroll(heads):
                for lane in T.vectorized(span):
                    sums[g, lane] = outs[g0 * heads + g, c * span + lane] * shrink[g0 * heads + g]
            for j in T.serial(KEYS):
                for g in T.unroll(heads):
                    for lane in T.vectorized(span):
                        sums[g, lane] += v[j, c * span + lane] * scores[g0 * heads + g, j]
            for g in T.unroll(heads):
                for lane in T.vectorized(span):
                    outs[g0 * heads + g, c * span + lane] = sums[g, lane]

    @T.prim_func(private=True, s_tir=True)
    def decode(
        q_handle: T.handle,
        pages_handle: T.handle,
        page_indptr_handle: T.handle,
        page_indices_handle: T.handle,
        last_page_lens_handle: T.handle,
        first_positions_handle: T.handle,
        q_positions_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        batch = T.int64()
        num_pages = T.int64()
        page_size = T.int64()
        num_indices = T.int64()
        q = T.match_buffer(q_handle, (batch, carriers, entry) if QUANTIZED_KV else (batch, num_heads, head_dim), dtype)
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, num_kv_heads, page_size, entry if QUANTIZED_KV else head_dim), dtype
        )
        page_indptr = T.match_buffer(page_indptr_handle, (batch + 1,), "int32", elem_offset=T.int64())
        page_indices = T.match_buffer(page_indices_handle, (num_indices,), "int32", elem_offset=T.int64())
        last_page_lens = T.match_buffer(last_page_lens_handle, (batch,), "int32", elem_offset=T.int64())
        first_positions = T.match_buffer(first_positions_handle, (batch,), "int32", elem_offset=T.int64())
        q_positions = T.match_buffer(q_positions_handle, (batch,), "int32", elem_offset=T.int64())
        out = T.match_buffer(
            out_handle, (batch, carriers, entry) if QUANTIZED_KV else (batch, num_heads, head_dim), dtype
        )
        lse = T.match_buffer(lse_handle, (batch, carriers if QUANTIZED_KV else num_heads), "float32")
        if QUANTIZED_KV:
            q_floats, out_floats = floats(q, num_heads, head_dim), floats(out, num_heads, head_dim)
        slots: T.let[T.int32] = T.cast(page_size, "int32")
        scale: T.let[T.float32] = T.abs(sm_scale) * T.float32(LOG2_E)

        most: T.let[T.int64] = num_indices * page_size // SPLIT + batch  # splits
        table = T.alloc_buffer((most, 3), "int32")  # of each split: sequence, first key, end
        split_indptr = T.alloc_buffer((batch + 1,), "int32")
        part_outs = T.alloc_buffer((most, num_heads, dims), "float32")
        part_peaks = T.alloc_buffer((most, num_heads), "float32")
        part_totals = T.alloc_buffer((most, num_heads), "float32")
        split_indptr[0] = 0
        for s in T.serial(T.cast(batch, "int32")):
            last: T.let[T.int32] = q_positions[s] - first_positions[s]
            length: T.let[T.int32] = num_keys(page_indptr[s + 1] - page_indptr[s], slots, last_page_lens[s])
            begin: T.let[T.int32] = T.max(last + 1 - reach(sm_scale, window), 0)
            end: T.let[T.int32] = T.min(length, last + 1)
            splits: T.let[T.int32] = (T.max(end - begin, 0) + SPLIT - 1) // SPLIT
            for i in T.serial(splits):
                table[split_indptr[s] + i, 0] = s
                table[split_indptr[s] + i, 1] = begin + i * SPLIT
                table[split_indptr[s] + i, 2] = T.min(begin + (i + 1) * SPLIT, end)
            split_indptr[s + 1] = split_indptr[s] + splits

        for task in T.parallel(split_indptr[batch] * num_kv_heads):
            part: T.let[T.int32] = task // num_kv_heads
            head: T.let[T.int32] = task % num_kv_heads
            sequence: T.let[T.int32] = table[part, 0]
            begin: T.let[T.int32] = table[part, 1]
            end: T.let[T.int32] = table[part, 2]
            queries = T.alloc_buffer((rows, dims), "float32")
            outs = T.alloc_buffer((rows, dims), "float32")
            peak = T.alloc_buffer((rows,), "float32")
            total = T.alloc_buffer((rows,), "float32")
            shrink = T.alloc_buffer((rows,), "float32")
            scores = T.alloc_buffer((rows, KEYS), "float32")
            k = T.alloc_buffer((KEYS, dims), "float32")
            v = T.alloc_buffer((KEYS, dims), "float32")
            for g in T.serial(rows):
                peak[g] = T.float32(NO_KEY)
                total[g] = T.float32(0)
                for d in T.vectorized(dims):
                    outs[g, d] = T.float32(0)
                for d in T.vectorized(dims):
                    queries[g, d] = T.float32(0)
            for g in T.serial(group):
                for d in T.vectorized(head_dim):
                    if QUANTIZED_KV:
                        queries[g, d] = q_floats[sequence, head * group + g, d] * scale
                    else:
                        queries[g, d] = T.cast(q[sequence, head * group + g, d], "float32") * scale
            if dims > head_dim:
                for j in T.serial(KEYS):
                    for d in T.serial(dims - head_dim):
                        k[j, head_dim + d] = T.float32(0)
                        v[j, head_dim + d] = T.float32(0)
            for block in T.serial((end - begin + KEYS - 1) // KEYS):
                first: T.let[T.int32] = begin + block * KEYS
                for j in T.serial(KEYS):
                    # Past the end the last key again, for a weight of 0 does not hide what lies there.
                    key: T.let[T.int32] = T.min(first + j, end - 1)
                    page: T.let[T.int64] = T.cast(page_indices[page_indptr[sequence] + T.truncdiv(key, slots)], "int64")
                    slot: T.let[T.int32] = T.truncmod(key, slots)
                    copy_row(k, j, pages, (page, 0, head, slot), head_dim, lanes)
                    copy_row(v, j, pages, (page, 1, head, slot), head_dim, lanes)
                score(k, queries, scores, end - first)
                weigh(scores, shrink, peak, total)
                accumulate(v, scores, shrink, outs)
            for g in T.serial(group):
                part_peaks[part, head * group + g] = peak[g]
                part_totals[part, head * group + g] = total[g]
                for d in T.vectorized(dims):
                    part_outs[part, head * group + g, d] = outs[g, d]

        for s in T.serial(T.cast(batch, "int32")):
            for h in T.serial(num_heads):
                joined = T.alloc_buffer((dims,), "float32")
                peak = T.alloc_buffer((2,), "float32", scope="local")  # and the sum
                peak[0] = T.float32(NO_KEY)
                peak[1] = T.float32(0)
                for d in T.vectorized(dims):
                    joined[d] = T.float32(0)
                for i in T.serial(split_indptr[s + 1] - split_indptr[s]):
                    peak[0] = T.max(peak[0], part_peaks[split_indptr[s] + i, h])
                for i in T.serial(split_indptr[s + 1] - split_indptr[s]):
                    weight: T.let[T.float32] = exp2(part_peaks[split_indptr[s] + i, h] - peak[0])
                    peak[1] += part_totals[split_indptr[s] + i, h] * weight
                    for d in T.vectorized(dims):
                        joined[d] += part_outs[split_indptr[s] + i, h, d] * weight
                share: T.let[T.float32] = T.float32(1) / T.Select(peak[1] > T.float32(0), peak[1], T.float32(1))
                for d in T.vectorized(head_dim):
                    if QUANTIZED_KV:
                        out_floats[s, h, d] = joined[d] * share
                    else:
                        out[s, h, d] = T.cast(joined[d] * share, dtype)
                lse[s, h] = peak[0] + T.log2(peak[1])

    return decode
