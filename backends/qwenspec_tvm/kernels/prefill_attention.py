"""Attention of several tokens a sequence on CPUs, as scheduled TIR: over keys in pages, and over the new keys.

The rows of a tile are pairs (token, query head of the group), and they lie in the lanes of vectors: queries are
transposed once a tile, then every product is an element of a key times a vector of rows, and the softmax of a
row stays in its lane. Keys and values of a block are first copied to float32, whatever their storage.
"""

from functools import cache

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from .attention_parts import FAR, LOG2_E, NO_KEY, copy_row, exp2, num_keys, reach
from .kv_entries import floats
from .kv_layout import entry_size, query_entries

QUANTIZED_KV = False  # flag: keys and values are cached quantised
ROWS = 64  # of a tile at least, where a sequence has so many
KEYS = 64  # of a block
STEP = 4  # keys, or dimensions, at once: with two vectors of rows each, eight independent sums


@cache
def prefill_attention(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, window: int | None, lanes: int
) -> tuple[PrimFunc, PrimFunc, PrimFunc]:
    """The functions (paged, ragged, tree) for the cache's slots.

    paged: queries over keys in pages; a token sees the keys at positions up to its own
    ragged: queries over the new keys of the same sequence, causal
    tree: queries over the new keys of the same sequence, each token seeing its ancestors in a token tree
    All: with sm_scale < 0 a token at position p sees only p - window + 1 and later, and the scale is -sm_scale.
    Each writes softmax(scale · q Kᵀ) V and the log2 of the softmax's sum; 0 and -inf for a row without keys.
    [QUANTIZED_KV] dtype: of the entries that everything lies in
    """
    if QUANTIZED_KV:
        carriers, entry = query_entries(num_heads, head_dim), entry_size(head_dim)
    group = num_heads // num_kv_heads
    width = 2 * lanes
    strips = max(-(-ROWS // width), -(-group // width))
    tokens = strips * width // group  # of a tile
    dims = -(-head_dim // STEP) * STEP

    def visible(key, strip, lane, place, order, key_place, key_first, key_last, seen, is_tree):
        near = key_place[key] > place[strip, lane] - seen
        if is_tree:
            return near & (key_first[key] <= order[strip, lane]) & (order[strip, lane] < key_last[key])
        return near & (key_place[key] <= place[strip, lane])

    @T.inline
    def attend_strip(
        strip, steps, queries, k, v, outs, peak, total, place, order, key_place, key_first, key_last, seen, is_tree
    ):
        scores = T.alloc_buffer((KEYS, width), "float32")
        shrink = T.alloc_buffer((width,), "float32", scope="local")
        top = T.alloc_buffer((width,), "float32", scope="local")
        for lane in T.vectorized(width):
            top[lane] = peak[strip, lane]
        for step in T.serial(steps):
            sums = T.alloc_buffer((STEP, width), "float32", scope="local")
            for j in T.unroll(STEP):
                for lane in T.vectorized(width):
                    sums[j, lane] = T.float32(0)
            for d in T.serial(head_dim):
                for j in T.unroll(STEP):
                    for lane in T.vectorized(width):
                        sums[j, lane] += k[step * STEP + j, d] * queries[strip, d, lane]
            for j in T.unroll(STEP):
                for lane in T.vectorized(width):
                    scores[step * STEP + j, lane] = T.Select(
                        visible(
                            step * STEP + j, strip, lane, place, order, key_place, key_first, key_last, seen, is_tree
                        ),
                        sums[j, lane],
                        T.float32(-float("inf")),
                    )
                    top[lane] = T.max(top[lane], scores[step * STEP + j, lane])
        for lane in T.vectorized(width):
            shrink[lane] = exp2(peak[strip, lane] - top[lane])
            peak[strip, lane] = top[lane]
            total[strip, lane] = total[strip, lane] * shrink[lane]
        for j in T.serial(steps * STEP):
            for lane in T.vectorized(width):
                scores[j, lane] = exp2(scores[j, lane] - top[lane])
                total[strip, lane] += scores[j, lane]
        for step in T.serial(dims // STEP):
            sums = T.alloc_buffer((STEP, width), "float32", scope="local")
            for i in T.unroll(STEP):
                for lane in T.vectorized(width):
                    sums[i, lane] = outs[strip, step * STEP + i, lane] * shrink[lane]
            for j in T.serial(steps * STEP):
                for i in T.unroll(STEP):
                    for lane in T.vectorized(width):
                        sums[i, lane] += v[j, step * STEP + i] * scores[j, lane]
            for i in T.unroll(STEP):
                for lane in T.vectorized(width):
                    outs[strip, step * STEP + i, lane] = sums[i, lane]

    @T.inline
    def attend(q, indptr, positions, lengths, firsts, mask, mask_indptr, out, lse, sm_scale, load):
        """Over keys 0 … lengths[s] - 1 of each sequence s; key 0 is at position firsts[s]; mask: of a tree, or None.

        load(k, v, j, key, head, s): key and value into row j of a block
        """
        count = T.alloc_buffer((1,), "int32", scope="local")
        table = T.alloc_buffer((q.shape[0] // tokens + indptr.shape[0], 2), "int32")  # sequence and first token
        count[0] = 0
        for s in T.serial(T.cast(indptr.shape[0], "int32") - 1):
            for i in T.serial((indptr[s + 1] - indptr[s] + tokens - 1) // tokens):
                table[count[0], 0] = s
                table[count[0], 1] = indptr[s] + i * tokens
                count[0] += 1
        tiles: T.let[T.int32] = count[0]
        scale: T.let[T.float32] = T.abs(sm_scale) * T.float32(LOG2_E)
        seen: T.let[T.int32] = reach(sm_scale, window)
        for task in T.parallel(tiles * num_kv_heads):
            head: T.let[T.int32] = task // tiles
            sequence: T.let[T.int32] = table[task % tiles, 0]
            start: T.let[T.int32] = table[task % tiles, 1]
            rows: T.let[T.int32] = T.min(indptr[sequence + 1] - start, tokens) * group
            used: T.let[T.int32] = (rows + width - 1) // width

            queries = T.alloc_buffer((strips, head_dim, width), "float32")
            outs = T.alloc_buffer((strips, dims, width), "float32")
            peak = T.alloc_buffer((strips, width), "float32")
            total = T.alloc_buffer((strips, width), "float32")
            place = T.alloc_buffer((strips, width), "int32")  # of a row's token; -1 pads a strip
            order = T.alloc_buffer((strips, width), "int32")  # in the tree, depth first
            bounds = T.alloc_buffer((2,), "int32", scope="local")
            bounds[0] = FAR
            bounds[1] = -1
            for r in T.serial(used * width):
                strip: T.let[T.int32] = r // width
                lane_r: T.let[T.int32] = r % width
                if r < rows:
                    token: T.let[T.int32] = start + r // group
                    for d in T.serial(head_dim):
                        queries[strip, d, lane_r] = T.cast(q[token, head * group + r % group, d], "float32") * scale
                    place[strip, lane_r] = positions[token]
                    if mask is not None:
                        order[strip, lane_r] = mask[mask_indptr[sequence] + token - indptr[sequence], 0]
                    bounds[0] = T.min(bounds[0], positions[token])
                    bounds[1] = T.max(bounds[1], positions[token])
                else:
                    for d in T.serial(head_dim):
                        queries[strip, d, lane_r] = T.float32(0)
                    place[strip, lane_r] = -1
                    if mask is not None:
                        order[strip, lane_r] = -1
            for strip in T.serial(used):
                for lane in T.vectorized(width):
                    peak[strip, lane] = T.float32(NO_KEY)
                    total[strip, lane] = T.float32(0)
                for d in T.serial(dims):
                    for lane in T.vectorized(width):
                        outs[strip, d, lane] = T.float32(0)

            first: T.let[T.int32] = firsts[sequence]
            # Nodes of a tree are not in the order of their positions: all are looked at.
            begin: T.let[T.int32] = 0 if mask is not None else T.max(bounds[0] - seen + 1 - first, 0)
            end: T.let[T.int32] = (
                lengths[sequence] if mask is not None else T.min(lengths[sequence], bounds[1] + 1 - first)
            )
            k = T.alloc_buffer((KEYS, dims), "float32")
            v = T.alloc_buffer((KEYS, dims), "float32")
            key_place = T.alloc_buffer((KEYS,), "int32")
            key_first = T.alloc_buffer((KEYS,), "int32")
            key_last = T.alloc_buffer((KEYS,), "int32")
            for block in T.serial((T.max(end - begin, 0) + KEYS - 1) // KEYS):
                key: T.let[T.int32] = begin + block * KEYS
                keys: T.let[T.int32] = T.min(end - key, KEYS)
                steps: T.let[T.int32] = (keys + STEP - 1) // STEP
                for j in T.serial(steps * STEP):
                    if j < keys:
                        load(k, v, j, key + j, head, sequence)
                        if mask is not None:
                            key_place[j] = positions[indptr[sequence] + key + j]
                            key_first[j] = mask[mask_indptr[sequence] + key + j, 0]
                            key_last[j] = mask[mask_indptr[sequence] + key + j, 1]
                        else:
                            key_place[j] = first + key + j
                    else:  # A weight of 0 does not hide what lies in memory: 0 times NaN is NaN.
                        for d in T.serial(dims):
                            v[j, d] = T.float32(0)
                        key_place[j] = FAR
                        key_first[j] = FAR
                for strip in T.serial(used):
                    attend_strip(
                        strip, steps, queries, k, v, outs, peak, total, place, order, key_place, key_first, key_last,
                        seen, mask is not None,
                    )  # fmt: skip

            for r in T.serial(rows):
                strip: T.let[T.int32] = r // width
                lane_r: T.let[T.int32] = r % width
                sum_r: T.let[T.float32] = total[strip, lane_r]
                some: T.let[T.bool] = sum_r > T.float32(0)
                share: T.let[T.float32] = T.float32(1) / T.Select(some, sum_r, T.float32(1))
                token: T.let[T.int32] = start + r // group
                for d in T.serial(head_dim):
                    if QUANTIZED_KV:
                        out[token, head * group + r % group, d] = outs[strip, d, lane_r] * share
                    else:
                        out[token, head * group + r % group, d] = T.cast(outs[strip, d, lane_r] * share, dtype)
                lse[token, head * group + r % group] = T.Select(
                    some, peak[strip, lane_r] + T.log2(sum_r), T.float32(-float("inf"))
                )

    @T.prim_func(private=True, s_tir=True)
    def paged(
        q_handle: T.handle,
        q_indptr_handle: T.handle,
        pages_handle: T.handle,
        page_indptr_handle: T.handle,
        page_indices_handle: T.handle,
        last_page_lens_handle: T.handle,
        first_positions_handle: T.handle,
        q_positions_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        batch = T.int64()
        num_pages = T.int64()
        page_size = T.int64()
        num_indices = T.int64()
        q = T.match_buffer(q_handle, (n, carriers, entry) if QUANTIZED_KV else (n, num_heads, head_dim), dtype)
        q_indptr = T.match_buffer(q_indptr_handle, (batch + 1,), "int32", elem_offset=T.int64())
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, num_kv_heads, page_size, entry if QUANTIZED_KV else head_dim), dtype
        )
        page_indptr = T.match_buffer(page_indptr_handle, (batch + 1,), "int32", elem_offset=T.int64())
        page_indices = T.match_buffer(page_indices_handle, (num_indices,), "int32", elem_offset=T.int64())
        last_page_lens = T.match_buffer(last_page_lens_handle, (batch,), "int32", elem_offset=T.int64())
        first_positions = T.match_buffer(first_positions_handle, (batch,), "int32", elem_offset=T.int64())
        q_positions = T.match_buffer(q_positions_handle, (n,), "int32", elem_offset=T.int64())
        out = T.match_buffer(out_handle, (n, carriers, entry) if QUANTIZED_KV else (n, num_heads, head_dim), dtype)
        lse = T.match_buffer(lse_handle, (n, carriers if QUANTIZED_KV else num_heads), "float32")
        if QUANTIZED_KV:
            q_floats, out_floats = floats(q, num_heads, head_dim), floats(out, num_heads, head_dim)
        slots: T.let[T.int32] = T.cast(page_size, "int32")
        lengths = T.alloc_buffer((batch,), "int32")
        for s in T.serial(T.cast(batch, "int32")):
            lengths[s] = num_keys(page_indptr[s + 1] - page_indptr[s], slots, last_page_lens[s])

        @T.inline
        def load(k, v, j, key, head, sequence):
            page: T.let[T.int32] = page_indices[page_indptr[sequence] + T.truncdiv(key, slots)]
            slot: T.let[T.int32] = T.truncmod(key, slots)
            copy_row(k, j, pages, (T.cast(page, "int64"), 0, head, slot), head_dim, lanes)
            copy_row(v, j, pages, (T.cast(page, "int64"), 1, head, slot), head_dim, lanes)

        if QUANTIZED_KV:
            attend(
                q_floats, q_indptr, q_positions, lengths, first_positions, None, None, out_floats, lse, sm_scale, load
            )
        else:
            attend(q, q_indptr, q_positions, lengths, first_positions, None, None, out, lse, sm_scale, load)

    @T.prim_func(private=True, s_tir=True)
    def ragged(
        q_handle: T.handle,
        q_indptr_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        kv_indptr_handle: T.handle,
        q_positions_handle: T.handle,
        first_positions_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        batch = T.int64()
        q = T.match_buffer(q_handle, (n, carriers, entry) if QUANTIZED_KV else (n, num_heads, head_dim), dtype)
        q_indptr = T.match_buffer(q_indptr_handle, (batch + 1,), "int32", elem_offset=T.int64())
        k_data = T.match_buffer(k_handle, (n, num_kv_heads, entry if QUANTIZED_KV else head_dim), dtype)
        v_data = T.match_buffer(v_handle, (n, num_kv_heads, entry if QUANTIZED_KV else head_dim), dtype)
        kv_indptr = T.match_buffer(kv_indptr_handle, (batch + 1,), "int32", elem_offset=T.int64())
        q_positions = T.match_buffer(q_positions_handle, (n,), "int32", elem_offset=T.int64())
        first_positions = T.match_buffer(first_positions_handle, (batch,), "int32", elem_offset=T.int64())
        out = T.match_buffer(out_handle, (n, carriers, entry) if QUANTIZED_KV else (n, num_heads, head_dim), dtype)
        lse = T.match_buffer(lse_handle, (n, carriers if QUANTIZED_KV else num_heads), "float32")
        if QUANTIZED_KV:
            q_floats, out_floats = floats(q, num_heads, head_dim), floats(out, num_heads, head_dim)
        lengths = T.alloc_buffer((batch,), "int32")
        for s in T.serial(T.cast(batch, "int32")):
            lengths[s] = kv_indptr[s + 1] - kv_indptr[s]

        @T.inline
        def load(k, v, j, key, head, sequence):
            copy_row(k, j, k_data, (kv_indptr[sequence] + key, head), head_dim, lanes)
            copy_row(v, j, v_data, (kv_indptr[sequence] + key, head), head_dim, lanes)

        if QUANTIZED_KV:
            attend(
                q_floats, q_indptr, q_positions, lengths, first_positions, None, None, out_floats, lse, sm_scale, load
            )
        else:
            attend(q, q_indptr, q_positions, lengths, first_positions, None, None, out, lse, sm_scale, load)

    @T.prim_func(private=True, s_tir=True)
    def tree(
        q_handle: T.handle,
        q_indptr_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        kv_indptr_handle: T.handle,
        q_positions_handle: T.handle,
        mask_indptr_handle: T.handle,
        mask_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        bounds = T.int64()
        nodes = T.int64()
        q = T.match_buffer(q_handle, (n, carriers, entry) if QUANTIZED_KV else (n, num_heads, head_dim), dtype)
        q_indptr = T.match_buffer(q_indptr_handle, (bounds,), "int32", elem_offset=T.int64())
        k_data = T.match_buffer(k_handle, (n, num_kv_heads, entry if QUANTIZED_KV else head_dim), dtype)
        v_data = T.match_buffer(v_handle, (n, num_kv_heads, entry if QUANTIZED_KV else head_dim), dtype)
        kv_indptr = T.match_buffer(kv_indptr_handle, (bounds,), "int32", elem_offset=T.int64())
        q_positions = T.match_buffer(q_positions_handle, (n,), "int32", elem_offset=T.int64())
        mask_indptr = T.match_buffer(mask_indptr_handle, (bounds,), "int32", elem_offset=T.int64())
        mask = T.match_buffer(mask_handle, (nodes, 2), "int32", elem_offset=T.int64())
        out = T.match_buffer(out_handle, (n, carriers, entry) if QUANTIZED_KV else (n, num_heads, head_dim), dtype)
        lse = T.match_buffer(lse_handle, (n, carriers if QUANTIZED_KV else num_heads), "float32")
        if QUANTIZED_KV:
            q_floats, out_floats = floats(q, num_heads, head_dim), floats(out, num_heads, head_dim)
        lengths = T.alloc_buffer((bounds,), "int32")
        firsts = T.alloc_buffer((bounds,), "int32")
        for s in T.serial(T.cast(bounds, "int32") - 1):
            lengths[s] = kv_indptr[s + 1] - kv_indptr[s]
            firsts[s] = 0

        @T.inline
        def load(k, v, j, key, head, sequence):
            copy_row(k, j, k_data, (kv_indptr[sequence] + key, head), head_dim, lanes)
            copy_row(v, j, v_data, (kv_indptr[sequence] + key, head), head_dim, lanes)

        if QUANTIZED_KV:
            attend(q_floats, q_indptr, q_positions, lengths, firsts, mask, mask_indptr, out_floats, lse, sm_scale, load)
        else:
            attend(q, q_indptr, q_positions, lengths, firsts, mask, mask_indptr, out, lse, sm_scale, load)

    return paged, ragged, tree
