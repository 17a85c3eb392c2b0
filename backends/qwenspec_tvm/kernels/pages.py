"""What the KV cache does with keys and values beside attention, on CPUs, as scheduled TIR.

Pages are [num_pages, 2, num_kv_heads, page_size, head_dim], keys at 0 and values at 1; a position in the page
table is page · page_size + slot. Page sizes are free.
[QUANTIZED_KV] Heads are entries of the cache here (kv_layout.py), which are moved as they are.
"""

from functools import cache
from types import SimpleNamespace

from tvm.script import tirx as T

from .kv_entries import floats
from .kv_layout import entry_size, query_entries

QUANTIZED_KV = False  # flag: keys and values are cached quantised


@cache
def page_functions(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str) -> SimpleNamespace:
    """The functions split, append, copy_page, compact, get and merge for the cache's slots."""
    if QUANTIZED_KV:
        outputs = num_heads, head_dim
        num_heads, head_dim = query_entries(num_heads, head_dim), entry_size(head_dim)

    @T.prim_func(private=True, s_tir=True)
    def split(
        qkv_handle: T.handle,
        positions_handle: T.handle,
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        apply_rope: T.int64,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        qkv = T.match_buffer(qkv_handle, (n, num_heads + 2 * num_kv_heads, head_dim), dtype)
        T.match_buffer(positions_handle, (n,), "int32", elem_offset=T.int64())
        q = T.match_buffer(q_handle, (n, num_heads, head_dim), dtype)
        k = T.match_buffer(k_handle, (n, num_kv_heads, head_dim), dtype)
        v = T.match_buffer(v_handle, (n, num_kv_heads, head_dim), dtype)
        for i in T.parallel(n):
            for h in T.serial(num_heads):
                for d in T.vectorized(head_dim):
                    q[i, h, d] = qkv[i, h, d]
            for h in T.serial(num_kv_heads):
                for d in T.vectorized(head_dim):
                    k[i, h, d] = qkv[i, num_heads + h, d]
                for d in T.vectorized(head_dim):
                    v[i, h, d] = qkv[i, num_heads + num_kv_heads + h, d]

    @T.prim_func(private=True, s_tir=True)
    def append(pages_handle: T.handle, k_handle: T.handle, v_handle: T.handle, table_positions_handle: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        num_pages = T.int64()
        page_size = T.int64()
        pages = T.match_buffer(pages_handle, (num_pages, 2, num_kv_heads, page_size, head_dim), dtype)
        k = T.match_buffer(k_handle, (n, num_kv_heads, head_dim), dtype)
        v = T.match_buffer(v_handle, (n, num_kv_heads, head_dim), dtype)
        table_positions = T.match_buffer(table_positions_handle, (n,), "int32", elem_offset=T.int64())
        for i in T.parallel(n):
            page: T.let[T.int64] = T.truncdiv(T.cast(table_positions[i], "int64"), page_size)
            slot: T.let[T.int64] = T.truncmod(T.cast(table_positions[i], "int64"), page_size)
            for h in T.serial(num_kv_heads):
                for d in T.vectorized(head_dim):
                    pages[page, 0, h, slot, d] = k[i, h, d]
                for d in T.vectorized(head_dim):
                    pages[page, 1, h, slot, d] = v[i, h, d]

    @T.prim_func(private=True, s_tir=True)
    def copy_page(pages_handle: T.handle, source: T.int64, target: T.int64, length: T.int64):
        """The first `length` slots of a page into another."""
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        num_pages = T.int64()
        page_size = T.int64()
        pages = T.match_buffer(pages_handle, (num_pages, 2, num_kv_heads, page_size, head_dim), dtype)
        for part, h, slot in T.grid(2, num_kv_heads, length):
            for d in T.vectorized(head_dim):
                pages[target, part, h, slot, d] = pages[source, part, h, slot, d]

    @T.prim_func(private=True, s_tir=True)
    def compact(pages_handle: T.handle, indptr_handle: T.handle, moves_handle: T.handle, batch_size: T.int64):
        """Moves tokens in the page table, from moves[0] to moves[1], one after the other."""
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        num_pages = T.int64()
        page_size = T.int64()
        num_bounds = T.int64()
        num_moves = T.int64()
        pages = T.match_buffer(pages_handle, (num_pages, 2, num_kv_heads, page_size, head_dim), dtype)
        T.match_buffer(indptr_handle, (num_bounds,), "int32", elem_offset=T.int64())
        moves = T.match_buffer(moves_handle, (2, num_moves), "int32", elem_offset=T.int64())
        for i in T.serial(num_moves):
            source: T.let[T.int64] = T.cast(moves[0, i], "int64")
            target: T.let[T.int64] = T.cast(moves[1, i], "int64")
            for part, h in T.grid(2, num_kv_heads):
                for d in T.vectorized(head_dim):
                    pages[T.truncdiv(target, page_size), part, h, T.truncmod(target, page_size), d] = pages[
                        T.truncdiv(source, page_size), part, h, T.truncmod(source, page_size), d
                    ]

    @T.prim_func(private=True, s_tir=True)
    def get(
        pages_handle: T.handle,
        table_positions_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        layer: T.int64,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        num_layers = T.int64()
        num_pages = T.int64()
        page_size = T.int64()
        pages = T.match_buffer(pages_handle, (num_pages, 2, num_kv_heads, page_size, head_dim), dtype)
        table_positions = T.match_buffer(table_positions_handle, (n,), "int32", elem_offset=T.int64())
        k = T.match_buffer(k_handle, (num_layers, n, num_kv_heads, head_dim), dtype)
        v = T.match_buffer(v_handle, (num_layers, n, num_kv_heads, head_dim), dtype)
        for i in T.serial(n):
            page: T.let[T.int64] = T.truncdiv(T.cast(table_positions[i], "int64"), page_size)
            slot: T.let[T.int64] = T.truncmod(T.cast(table_positions[i], "int64"), page_size)
            for h in T.serial(num_kv_heads):
                for d in T.vectorized(head_dim):
                    k[layer, i, h, d] = pages[page, 0, h, slot, d]
                for d in T.vectorized(head_dim):
                    v[layer, i, h, d] = pages[page, 1, h, slot, d]

    @T.prim_func(private=True, s_tir=True)
    def merge(out_handle: T.handle, lse_handle: T.handle, other_handle: T.handle, other_lse_handle: T.handle):
        """The attention over two sets of keys, from that over each; lse: log2 of its sum, -inf where it has no key."""
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        out = T.match_buffer(out_handle, (n, num_heads, head_dim), dtype)
        lse = T.match_buffer(lse_handle, (n, num_heads), "float32")
        other = T.match_buffer(other_handle, (n, num_heads, head_dim), dtype)
        other_lse = T.match_buffer(other_lse_handle, (n, num_heads), "float32")
        if QUANTIZED_KV:
            out_floats = floats(out, *outputs)
            other_floats = floats(other, *outputs)
        for i in T.parallel(n):
            for h in T.serial(outputs[0] if QUANTIZED_KV else num_heads):
                # A row that no part has seen: -inf minus -inf would be NaN.
                top: T.let[T.float32] = T.max(T.max(lse[i, h], other_lse[i, h]), T.float32(-1e30))
                weight: T.let[T.float32] = T.exp2(lse[i, h] - top)
                other_weight: T.let[T.float32] = T.exp2(other_lse[i, h] - top)
                total: T.let[T.float32] = weight + other_weight
                share: T.let[T.float32] = T.Select(total > T.float32(0), weight / total, T.float32(0))
                if QUANTIZED_KV:
                    for d in T.vectorized(outputs[1]):
                        out_floats[i, h, d] = out_floats[i, h, d] * share + other_floats[i, h, d] * (
                            T.float32(1) - share
                        )
                else:
                    for d in T.vectorized(head_dim):
                        out[i, h, d] = T.cast(
                            T.cast(out[i, h, d], "float32") * share
                            + T.cast(other[i, h, d], "float32") * (T.float32(1) - share),
                            dtype,
                        )
                lse[i, h] = top + T.log2(total)

    return SimpleNamespace(split=split, append=append, copy_page=copy_page, compact=compact, get=get, merge=merge)
