"""Causal attention of several new tokens a sequence over its paged keys and values, prefix included."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import architecture, tl, triton, use_triton
from .paged import sequence_kv
from .quantized_kv import UNIT, attend, numbers, read_sequence

SLIDING = tl.constexpr(True)  # flag: some layer has a sliding window
QUANTIZED_KV = tl.constexpr(True)  # flag: what is cached is quantised
TOKEN_SCALES = tl.constexpr(True)  # flag: … with a scale for each token and head
STORED_KV_SCALES = tl.constexpr(True)  # flag: … with the layer's scales

QUERIES = 64  # of one sequence at a time, on a CPU


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_tables: Tensor,
    q_starts: Tensor,
    kv_lens: Tensor,
    max_q_len: int,
    scale: float,
    window: int | None,
    tree: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q Kᵀ) V of each sequence's new tokens, in float32; a token sees those up to itself.

    In a tree, a new token sees its sequence's earlier tokens, its ancestors and itself.
    [SLIDING] With a window, the token at position p sees p - window + 1 … p.

    q: [n, num_heads, head_dim], contiguous: the new tokens of all sequences, one sequence after the other
    k_pages, v_pages: [pages, page_size, num_kv_heads, head_dim], contiguous; the new tokens are already there
    [TOKEN_SCALES] k_scales, v_scales: [pages, page_size, num_kv_heads] float32, contiguous
    [STORED_KV_SCALES] k_scales, v_scales: [1] float32, the layer's
    block_tables: [b, max_blocks] int, each sequence's page numbers, contiguous
    q_starts: [b + 1] int, the first new token of each sequence, and n
    kv_lens: [b] int, tokens of each sequence, the new ones included
    max_q_len: the most new tokens of one sequence
    scale: of the scores, usually 1 / sqrt(head_dim)
    [SLIDING] window: how many of the last tokens are seen, or None for all
    tree: [n, 3] int, contiguous, each new token's depth, and in its sequence's depth-first order the first token of its
        subtree, itself, and the one after the last; None when every token is its next one's parent
    -> [n, num_heads · head_dim]
    """
    n, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    b, max_blocks = block_tables.shape
    if SLIDING:
        seen = max_blocks * page_size if window is None else window
    if not use_triton(q):
        return _prefill_attention_torch(
            q, k_pages, v_pages, k_scales, v_scales, block_tables, q_starts, kv_lens, scale, seen, tree
        )
    for tensor in (q, k_pages, v_pages, block_tables):
        assert tensor.is_contiguous()
    block_dim = triton.next_power_of_2(head_dim)
    block_m, block_n, num_warps = _blocks(q, block_dim, max_q_len, tree is not None)
    if QUANTIZED_KV and (tree is not None or architecture(q.device).startswith("gfx")):
        block_n = max(block_n // 2, 16)  # bytes are converted in registers, which masks need, too
    out = q.new_empty(n, heads * head_dim)
    _prefill_kernel[(heads, b, triton.cdiv(max_q_len, block_m))](
        q,
        k_pages,
        v_pages,
        k_scales,
        v_scales,
        block_tables,
        q_starts,
        kv_lens,
        tree,
        out,
        scale,
        max_blocks,
        seen,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_DIM=block_dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        TREE=tree is not None,
        num_warps=num_warps,
        num_stages=1 if QUANTIZED_KV and q.dtype == torch.float32 else 2,
    )
    return out


def _blocks(q: Tensor, block_dim: int, max_q_len: int, tree: bool) -> tuple[int, int, int]:
    """Queries and keys a block, and warps: the most that a chip's registers hold."""
    chip = architecture(q.device)
    if tree and chip.startswith("gfx"):
        return 16, 16, 4  # masks take scalar registers
    if q.dtype == torch.float32:
        return 32, 32, 8
    if block_dim > 128:
        return 64, 32, 4 if chip.startswith("gfx") else 8
    block_n = 64 if chip in ("sm_90", "sm_100") else 32
    return (64, block_n, 4) if max_q_len <= 64 or tree else (128, block_n, 8)


def _prefill_attention_torch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_tables: Tensor,
    q_starts: Tensor,
    kv_lens: Tensor,
    scale: float,
    window: int,
    tree: Tensor | None,
) -> Tensor:
    out = torch.empty_like(q)
    starts = q_starts.tolist()
    for i, length in enumerate(kv_lens.tolist()):
        prefix = length - (starts[i + 1] - starts[i])
        oldest = max(prefix - window + 1, 0) if SLIDING else 0  # the first key that some new token sees
        nodes = None if tree is None else tree[starts[i] : starts[i + 1]]
        if QUANTIZED_KV:
            kv = read_sequence(k_pages, v_pages, k_scales, v_scales, block_tables[i], oldest, length)
            # In blocks, for the scores of keys that the mask hides are computed, too.
        else:
            k, v = sequence_kv(k_pages, v_pages, block_tables[i], oldest, length)
            # In blocks, for scaled_dot_product_attention computes the scores of keys that its mask hides, too.
        for block in range(prefix, length, QUERIES):
            stop = min(block + QUERIES, length)
            first = max(block - window + 1, 0) if SLIDING and nodes is None else oldest
            key, query = torch.arange(first, stop), torch.arange(block, stop).unsqueeze(1)
            mask = key <= query
            if nodes is not None:
                mask = _tree_mask(nodes, key - prefix, query - prefix)
            if SLIDING:
                if nodes is not None:
                    key, query = (_positions(nodes, prefix, token) for token in (key, query))
                mask &= key > query - window
            new = slice(starts[i] + block - prefix, starts[i] + stop - prefix)
            if QUANTIZED_KV:
                out[new] = attend(q[new], kv, scale, slice(first - oldest, stop - oldest), mask)
            else:
                attended = F.scaled_dot_product_attention(
                    q[new].transpose(0, 1).unsqueeze(0),
                    k[:, first - oldest : stop - oldest].unsqueeze(0),
                    v[:, first - oldest : stop - oldest].unsqueeze(0),
                    attn_mask=mask,
                    scale=scale,
                    enable_gqa=True,
                )
                out[new] = attended[0].transpose(0, 1)
    return out.flatten(1)


def _tree_mask(nodes: Tensor, key: Tensor, query: Tensor) -> Tensor:
    """key [keys] and query [queries, 1] among the new tokens; what came before has negative numbers -> bool
    [queries, keys]"""
    first, last, order = nodes[key.clamp(min=0), 1], nodes[key.clamp(min=0), 2], nodes[query, 1]
    return (key < 0) | ((first <= order) & (order < last))


if SLIDING:

    def _positions(nodes: Tensor, prefix: int, token: Tensor) -> Tensor:
        """Of tokens given by their places in the sequence, where those of a tree come in the order they were given."""
        return torch.where(token < prefix, token, prefix + nodes[(token - prefix).clamp(min=0), 0])


@triton.jit
def _prefill_kernel(
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    block_tables_ptr,
    q_starts_ptr,
    kv_lens_ptr,
    tree_ptr,
    out_ptr,
    scale,
    max_blocks,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TREE: tl.constexpr,
):
    """Grid (query heads, sequences, blocks of new tokens), last block first: it has the most keys."""
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    block_m = tl.num_programs(2) - 1 - tl.program_id(2)
    q_start = tl.load(q_starts_ptr + sequence).to(tl.int64)
    q_len = (tl.load(q_starts_ptr + sequence + 1) - q_start).to(tl.int32)
    if block_m * BLOCK_M >= q_len:
        return
    kv_len = tl.load(kv_lens_ptr + sequence).to(tl.int32)
    kv_head = head // (HEADS // KV_HEADS)

    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DIM)
    n = tl.arange(0, BLOCK_N)
    mask = (m < q_len)[:, None] & (d < HEAD_DIM)[None, :]
    row = ((q_start + m) * HEADS + head)[:, None] * HEAD_DIM
    q = tl.load(q_ptr + row + d[None, :], mask=mask, other=0.0)
    if STORED_KV_SCALES:
        scale *= tl.load(k_scales_ptr) * UNIT
    query = kv_len - q_len + m
    if TREE:
        node_ptr = tree_ptr + (q_start + m) * 3
        order = tl.load(node_ptr + 1, mask=m < q_len, other=0).to(tl.int32)
        if SLIDING:
            query = kv_len - q_len + tl.load(node_ptr, mask=m < q_len, other=0).to(tl.int32)
    if SLIDING:
        # A block of a tree may begin at any depth.
        oldest = tl.maximum(kv_len - q_len + (0 if TREE else block_m * BLOCK_M) - window + 1, 0)
    stop = tl.minimum(kv_len - q_len + (block_m + 1) * BLOCK_M, kv_len)
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * max_blocks
    # A finite start keeps exp2(peak - new_peak) from becoming NaN in blocks where a query sees no key.
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for block in range(oldest // BLOCK_N * BLOCK_N if SLIDING else 0, stop, BLOCK_N):
        key = block + n
        # What no query of this block sees is not loaded: unused pages may hold NaN, and 0 · NaN is NaN.
        seen = key < stop
        if SLIDING:
            seen = seen & (key >= oldest)
        page = tl.load(table_ptr + key // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        offset = ((page * PAGE_SIZE + key % PAGE_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        kv_mask = seen[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_pages_ptr + offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        v = tl.load(v_pages_ptr + offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        if QUANTIZED_KV:
            k, v = numbers(k, q.dtype), numbers(v, q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        if TOKEN_SCALES:
            token_head = (page * PAGE_SIZE + key % PAGE_SIZE) * KV_HEADS + kv_head
            scores *= tl.load(k_scales_ptr + token_head, mask=seen, other=0.0)[None, :] * UNIT
        if TREE:
            new = seen & (key >= kv_len - q_len)
            key_ptr = tree_ptr + (q_start + key - (kv_len - q_len)) * 3
            first = tl.load(key_ptr + 1, mask=new, other=0).to(tl.int32)
            last = tl.load(key_ptr + 2, mask=new, other=1 << 30).to(tl.int32)  # all descend from what came before
            # first <= order < last, in one comparison: many masks are too much for a chip's scalar registers.
            size = tl.where(seen, last - first, 0).to(tl.uint32)
            visible = (order[:, None] - first[None, :]).to(tl.uint32) < size[None, :]
        else:
            visible = key[None, :] <= query[:, None]
        if SLIDING:
            position = key
            if TREE:
                position = tl.where(new, kv_len - q_len + tl.load(key_ptr, mask=new, other=0).to(tl.int32), key)
            visible = visible & (position[None, :] > query[:, None] - window)
        scores = tl.where(visible, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        if TOKEN_SCALES:
            weights *= tl.load(v_scales_ptr + token_head, mask=seen, other=0.0)[None, :] * UNIT
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = new_peak

    if STORED_KV_SCALES:
        acc *= tl.load(v_scales_ptr) * UNIT
    out = acc / total[:, None]
    tl.store(out_ptr + row + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
