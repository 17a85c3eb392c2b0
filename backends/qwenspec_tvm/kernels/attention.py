"""The paged KV cache and attention over it.

The cache is TVM's: pages, sequences, forks and token trees. On CPUs every function that it calls is ours; its own
CPU kernels walk the whole cache for each query.
[QUANTIZED_KV] It holds entries of bytes (kv_layout.py), in which queries and outputs go through it too.
[SLIDING] A sliding layer says so by a negative scale there, for the cache does not tell its functions which layer they
[SLIDING] work for.
"""

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import AttnKind, PagedKVCache, RopeMode, TIRPagedKVCache
from tvm.target import Target

from .decode_attention import decode_attention
from .kv_entries import pack, unpack
from .kv_layout import ENTRY_DTYPE, entry_size, query_entries
from .pages import page_functions
from .prefill_attention import prefill_attention
from .target import is_cpu, lanes

SLIDING = True  # flag: some layer has a sliding window
QUANTIZED_KV = False  # flag: keys and values are cached quantised
STORED_KV_SCALES = False  # flag: … with scales from the checkpoint


def create_cache(
    max_batch_size: Any,
    max_total_seq_len: Any,
    prefill_chunk_size: Any,
    page_size: Any,
    support_sliding_window: Any,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    windows: Sequence[int | None],
    dtype: str,
) -> PagedKVCache:
    """The cache of a model, created where the Relax function that is being built runs.

    max_batch_size … support_sliding_window: variables of that function, in the order of its shape arguments.
        Layers keep every token, whatever support_sliding_window says: it is there for callers' sake.
    windows: of each layer, how many of the last tokens it sees, or None for all
    [not QUANTIZED_KV] dtype: of keys and values
    """
    config = [max_batch_size, max_total_seq_len, prefill_chunk_size, page_size]
    sliding = {window for window in windows if window is not None}
    assert len(sliding) <= 1, "one window a model"
    window = next(iter(sliding), None)
    if QUANTIZED_KV:
        return _cpu_cache(config, len(windows), num_heads, num_kv_heads, head_dim, window, ENTRY_DTYPE)
    if is_cpu():
        return _cpu_cache(config, len(windows), num_heads, num_kv_heads, head_dim, window, dtype)
    kinds = ["mha" if window is None else "mha_sliding" for window in windows]
    if "mha" not in kinds:
        kinds.append("mha")  # of no layer: the cache allocates what all layers need only where one is "mha"
    return TIRPagedKVCache(
        attn_kind=kinds,
        max_batch_size=max_batch_size,
        max_total_seq_len=max_total_seq_len,
        prefill_chunk_size=prefill_chunk_size,
        page_size=page_size,
        support_sliding_window=0,
        layer_partition=relax.ShapeExpr([0, len(windows)]),
        num_hidden_layers=len(windows),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        mla_original_qk_head_dim=0,
        mla_original_v_head_dim=0,
        rope_mode=RopeMode.NONE,
        rope_scale=1,
        rope_theta=1,
        rope_scaling={},
        rope_ext_factors=relax.prim_value(0),
        rotary_dim=head_dim,
        enable_disaggregation=False,
        dtype=dtype,
        target=Target.current(),
        layer_sliding_window_size=window or 1024,
    )


if not QUANTIZED_KV:

    def attend(
        cache: PagedKVCache, layer_id: int, qkv: Tensor, num_heads: int, scale: float, window: int | None
    ) -> Tensor:
        """softmax(scale · q Kᵀ) V over the tokens of each sequence, in float32; caches the new keys and values.

        qkv: [n, num_heads + 2 · num_kv_heads, head_dim], rotated, the new tokens of all sequences in the cache's dtype
        scale: of the scores, above 0, usually 1 / sqrt(head_dim)
        [SLIDING] window: how many of the last tokens are seen, or None for all; the layer's, as create_cache was told
        -> [n, num_heads, head_dim]
        """
        n, heads, head_dim = qkv.shape
        if SLIDING and window is not None and is_cpu():
            scale = -scale
        out = cache.attention_with_fused_qkv(layer_id, op.reshape(qkv, (1, n, heads, head_dim)), num_heads, scale)
        return op.reshape(out, (n, num_heads, head_dim))

else:

    def attend(
        cache: PagedKVCache,
        layer_id: int,
        qkv: Tensor,
        num_heads: int,
        scale: float,
        window: int | None,
        k_scale: Tensor,
        v_scale: Tensor,
    ) -> Tensor:
        """softmax(scale · q Kᵀ) V over the tokens of each sequence, in float32; caches the new keys and values.

        All are seen as they are cached, the new ones too. The output is rounded once.

        qkv: [n, num_heads + 2 · num_kv_heads, head_dim], rotated, the new tokens of all sequences in any float dtype
        scale: of the scores, above 0, usually 1 / sqrt(head_dim)
        [SLIDING] window: how many of the last tokens are seen, or None for all; the layer's, as create_cache was told
        [STORED_KV_SCALES] k_scale, v_scale: the layer's, [1] float32, above 0
        -> [n, num_heads, head_dim], qkv's dtype
        """
        n, head_dim = qkv.shape[0], int(qkv.shape[2])
        carriers, entry = query_entries(num_heads, head_dim), entry_size(head_dim)
        if SLIDING and window is not None:
            scale = -scale
        entries = to_entries(qkv, num_heads, k_scale, v_scale)
        entries = op.reshape(entries, (1, n, int(entries.shape[1]), entry))
        out = op.reshape(cache.attention_with_fused_qkv(layer_id, entries, carriers, scale), (n, carriers, entry))
        outputs = Tensor.placeholder((n, num_heads, head_dim), qkv.dtype)
        inputs = [out, v_scale] if STORED_KV_SCALES else [out]
        return op.tensor_ir_op(unpack(num_heads, head_dim, qkv.dtype), "unpack_outputs", inputs, outputs)

    def to_entries(qkv: Tensor, num_heads: int, k_scale: Tensor, v_scale: Tensor) -> Tensor:
        """What goes through the cache: queries as float32, keys and values quantised.

        qkv: [n, num_heads + 2 · num_kv_heads, head_dim]
        [STORED_KV_SCALES] k_scale, v_scale: [1] float32
        -> [n, query_entries + 2 · num_kv_heads, entry_size], int8
        """
        n, cached, head_dim = qkv.shape[0], int(qkv.shape[1]) - num_heads, int(qkv.shape[2])
        shape = n, query_entries(num_heads, head_dim) + cached, entry_size(head_dim)
        inputs = [qkv, k_scale, v_scale] if STORED_KV_SCALES else [qkv]
        function = pack(num_heads, cached, head_dim, qkv.dtype)
        return op.tensor_ir_op(function, "pack_entries", inputs, Tensor.placeholder(shape, ENTRY_DTYPE))


def _cpu_cache(
    config: list[Any],
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    dtype: str,
) -> PagedKVCache:
    builder = relax.BlockBuilder.current()
    sizes = (num_heads, num_kv_heads, head_dim, dtype)
    pages = page_functions(*sizes)
    paged, ragged, tree = prefill_attention(*sizes, window, lanes())
    decode = decode_attention(*sizes, window, lanes())

    def add(function: tvm.tirx.PrimFunc, name: str) -> Any:
        return builder.add_func(function, name)

    def slot(function: tvm.tirx.PrimFunc, name: str) -> relax.Tuple:
        return relax.Tuple([tvm.ir.StringImm("tirx"), add(function, name)])

    unused = relax.Tuple([])
    arguments = [
        relax.ShapeExpr([*config, 0]),  # no per-sequence windows
        relax.ShapeExpr([0, num_layers]),
        relax.prim_value(query_entries(num_heads, head_dim) if QUANTIZED_KV else num_heads),
        relax.prim_value(num_kv_heads),
        relax.prim_value(entry_size(head_dim) if QUANTIZED_KV else head_dim),
        relax.prim_value(entry_size(head_dim) if QUANTIZED_KV else head_dim),
        relax.ShapeExpr([int(AttnKind.MHA)] * num_layers),
        relax.prim_value(False),  # nothing is sent to other machines
        relax.prim_value(int(RopeMode.NONE)),
        relax.prim_value(1),  # the scale and base of RoPE, unused
        relax.prim_value(1),
        relax.prim_value(0),
        relax.op.zeros((), dtype),
        add(pages.append, "append_to_pages"),
        relax.prim_value(0),  # of MLA
        slot(ragged, "ragged_prefill_attention"),
        slot(paged, "paged_prefill_attention"),
        slot(decode, "decode_attention"),
        unused,  # prefill and decode of layers that the cache itself lets slide
        unused,
        unused,  # a tree over pages: a tree is committed before the next tokens come
        slot(tree, "tree_attention"),
        unused,  # MLA
        relax.Tuple([add(pages.merge, "merge_attention")]),
        add(pages.split, "split_qkv"),
        add(pages.copy_page, "copy_page"),
        add(pages.get, "get_keys_and_values"),
        add(pages.compact, "compact_pages"),
    ]
    created = relax.call_pure_packed("vm.builtin.paged_attention_kv_cache_create", *arguments, ty_args=relax.AnyType())
    return PagedKVCache(_expr=created, _name="paged_kv_cache")
