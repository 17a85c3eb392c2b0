"""Each kernel against the float64 oracle, on any device: the checks of the interpreter, of a GPU and of the CPU path.

Every buffer, the functions' own included, lies between guard regions of NaN that must stay as they are; memory
that may not be read is NaN too, and memory that must be written starts as NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from unittest import mock

import kernel_oracle as oracle
import torch
from kernel_variants import load
from torch import Tensor

GUARD = 64  # elements on either side
EPS = 1e-6
# Relative to the oracle's magnitude: a few roundings to the dtype; float32 leaves room for long sums.
TOLERANCE = {torch.float32: 5e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


@dataclass
class Arena:
    """Hands out tensors between guard regions, and looks at the regions afterwards."""

    device: torch.device
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # whole buffer, what is handed out

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        # Integers are page numbers, slots and lengths: 0 is a page of NaN.
        blank = float("nan") if dtype.is_floating_point else 0
        whole = torch.full((size + 2 * GUARD,), blank, dtype=dtype, device=self.device)
        inner = whole[GUARD : GUARD + size].view(torch.Size(shape))
        self.buffers.append((whole, inner))
        return inner

    def put(self, tensor: Tensor) -> Tensor:
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def check(self) -> None:
        for whole, _ in self.buffers:
            for region in (whole[:GUARD], whole[-GUARD:]):
                kept = region.isnan() if region.dtype.is_floating_point else region == 0
                assert bool(kept.all()), f"written outside of a buffer of {whole.numel() - 2 * GUARD} {whole.dtype}"

    @contextmanager
    def watch(self, expected: Sequence[str]) -> Iterator[None]:
        """What runs inside allocates here, and launches just the kernels named (none on the CPU path)."""
        launched: list[str] = []

        plain = Tensor.new_empty

        def new_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None, **rest: object) -> Tensor:
            if rest:  # the interpreter's own
                return plain(like, *shape, **rest)
            return self.empty(shape, dtype or like.dtype)

        with mock.patch.object(Tensor, "new_empty", new_empty), _record_launches(launched):
            yield
        assert launched == (list(expected) if runs_kernels(self.device) else [])
        self.check()


def runs_kernels(device: torch.device) -> bool:
    """Whether the kernels are what is tested here, and not their PyTorch paths."""
    use_triton: bool = load("dispatch").use_triton(torch.empty(0, device=device))
    return use_triton


@contextmanager
def _record_launches(launched: list[str]) -> Iterator[None]:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    patches = []
    for owner in (InterpretedFunction, JITFunction):

        def run(self, *args, _run=owner.run, **kwargs):  # type: ignore[no-untyped-def]
            launched.append(self.fn.__name__)
            return _run(self, *args, **kwargs)

        patches.append(mock.patch.object(owner, "run", run))
    with patches[0], patches[1]:
        yield


def assert_close(name: str, got: Tensor, expected: oracle.Result, dtype: torch.dtype) -> None:
    want, magnitude = expected
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, not {tuple(want.shape)}"
    error = (got.cpu().double() - want).abs()
    allowed = TOLERANCE[dtype] * (magnitude + torch.finfo(dtype).smallest_normal)
    bad = ~(error <= allowed)  # NaN is bad
    worst = float((error / allowed).nan_to_num(float("inf")).max())
    assert not bad.any(), (
        f"{name} {dtype}: {int(bad.sum())} of {bad.numel()} values are off, the first at {bad.nonzero()[0].tolist()}, "
        f"the worst by {worst:.3g} × the tolerance"
    )


def _normal(seed: int, *shape: int, dtype: torch.dtype, outlier: float = 40.0) -> Tensor:
    """Standard normal, but for outlier channels, which trained models have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x[..., 3::11] *= outlier
    return x.to(dtype)


def _weight(seed: int, size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + torch.rand(size, generator=generator)).to(dtype)


# -------------------------------------------------------------------------------------------------------- checks


def check_norm(device: torch.device, dtype: torch.dtype, n: int, size: int, one_plus: bool) -> None:
    norm = load("norm", ONE_PLUS=one_plus)
    arena = Arena(device)
    x, residual = (arena.put(_normal(seed, n, size, dtype=dtype)) for seed in (1, 2))
    weight = arena.put(_weight(3, size, dtype))
    before = x.clone(), residual.clone()
    with arena.watch(["_rms_norm_kernel"]):
        out = norm.rms_norm(x, weight, EPS)
    assert_close("rms_norm", out, oracle.rms_norm(x.cpu(), weight.cpu(), EPS, one_plus), dtype)
    with arena.watch(["_add_rms_norm_kernel"]):
        out, h = norm.add_rms_norm(x, residual, weight, EPS)
    # One addition, rounded once: exact.
    assert torch.equal(h.cpu(), (before[0].cpu().float() + before[1].cpu().float()).to(dtype))
    assert_close("add_rms_norm", out, oracle.rms_norm(h.cpu(), weight.cpu(), EPS, one_plus), dtype)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def check_activation(device: torch.device, dtype: torch.dtype, n: int, size: int, activation: str) -> None:
    arena = Arena(device)
    gate_up = arena.put(_normal(4, n, 2 * size, dtype=dtype))
    with arena.watch(["_act_and_mul_kernel"]):
        out = load("activation", ACTIVATION=activation).act_and_mul(gate_up)
    assert_close(activation, out, oracle.act_and_mul(gate_up.cpu(), activation), dtype)


def check_rotate(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    tables: torch.dtype,
    qk_norm: bool,
    one_plus: bool,
    logn: bool,
) -> None:
    flags = {"QK_NORM": qk_norm, "ONE_PLUS": one_plus, "LOGN": logn, "PARTIAL_ROTARY": rotary_dim < head_dim}
    page_size, pages = 4, -(-n // 4) + 2
    arena = Arena(device)
    qkv = _normal(5, n, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = torch.rand(n, rotary_dim // 2, generator=torch.Generator().manual_seed(6)) * 100
    cos, sin = (1.1 * angles.cos()).to(tables), (1.1 * angles.sin()).to(tables)
    slots = torch.randperm((pages - 1) * page_size, generator=torch.Generator().manual_seed(7))[:n] + page_size
    slots[n // 2 : n // 2 + 1] = -1 if n > 1 else slots[0]
    cache = [arena.empty((pages, page_size, kv_heads, head_dim), dtype) for _ in "kv"]
    q_weight, k_weight = _weight(8, head_dim, dtype), _weight(9, head_dim, dtype)
    query_scale = 1 + torch.rand(n, generator=torch.Generator().manual_seed(10))
    arguments = [arena.put(x) for x in (qkv, cos, sin)] + cache + [arena.put(slots)]
    if qk_norm:
        arguments += [arena.put(q_weight), arena.put(k_weight), EPS]  # type: ignore[list-item]
    if logn:
        arguments.append(arena.put(query_scale))
    with arena.watch(["_rotate_and_cache_kernel"]):
        q = load("qkv", **flags).rotate_and_cache(*arguments)

    x_q, x_k, x_v = qkv.view(n, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if qk_norm:
        x_q = oracle.rms_norm(x_q, q_weight, EPS, one_plus)[0]
        x_k = oracle.rms_norm(x_k, k_weight, EPS, one_plus)[0]
    want_q, magnitude_q = oracle.rotate(x_q, cos, sin)
    if logn:
        factor = query_scale.double()[:, None, None]
        want_q, magnitude_q = want_q * factor, magnitude_q * factor
    assert_close("q", q, (want_q, magnitude_q), dtype)
    assert q.is_contiguous()
    cached = slots >= 0
    k_rows, v_rows = (rows.cpu().view(-1, kv_heads, head_dim) for rows in cache)
    want_k, magnitude_k = oracle.rotate(x_k, cos, sin)
    assert_close("k", k_rows[slots[cached]], (want_k[cached], magnitude_k[cached]), dtype)
    assert torch.equal(v_rows[slots[cached]], x_v[cached])
    rest = torch.ones(len(k_rows), dtype=torch.bool)
    rest[slots[cached]] = False
    assert bool(k_rows[rest].isnan().all()), "keys went to slots of no token"
    assert bool(v_rows[rest].isnan().all()), "values went to slots of no token"


@dataclass
class Paged:
    """Sequences in shuffled pages; whatever is not a visible token's row is NaN."""

    k: list[Tensor]  # [length, kv_heads, head_dim] a sequence
    v: list[Tensor]
    k_pages: Tensor
    v_pages: Tensor
    tables: Tensor


def paged(
    arena: Arena,
    dtype: torch.dtype,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    lengths: Sequence[int],
    first_seen: Sequence[int],
    index: torch.dtype,
    shuffle: bool,
) -> Paged:
    """Pages before that of `first_seen` have been given back: their place in the table is page 0, which is NaN."""
    blocks = [-(-length // page_size) for length in lengths]
    order = torch.arange(1, sum(blocks) + 1)
    if shuffle:
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(11))]
    shape = (sum(blocks) + 2, page_size, kv_heads, head_dim)
    k_pages, v_pages = torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)
    tables = torch.zeros(len(lengths), max(blocks) + 1, dtype=index)
    made = Paged([], [], k_pages, v_pages, tables)
    start = 0
    for i, (length, count, first) in enumerate(zip(lengths, blocks, first_seen, strict=True)):
        k, v = (_normal(seed + i, length, kv_heads, head_dim, dtype=dtype) for seed in (100, 200))
        pages, kept = order[start : start + count], max(first, 0) // page_size
        start += count
        made.k.append(k)
        made.v.append(v)
        tables[i, kept:count] = pages[kept:].to(index)
        for rows, x in ((k_pages, k), (v_pages, v)):
            filled = torch.full((count * page_size, kv_heads, head_dim), float("nan"), dtype=dtype)
            filled[max(first, 0) : length] = x[max(first, 0) :]
            rows[pages] = filled.view(count, page_size, kv_heads, head_dim)
    made.k_pages, made.v_pages, made.tables = (arena.put(x) for x in (k_pages, v_pages, tables))
    return made


def check_decode(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    lengths: Sequence[int],
    window: int | None = None,
    sliding: bool = False,
    processors: int = 8,
    index: torch.dtype = torch.int32,
    shuffle: bool = True,
) -> None:
    """`lengths` of 0 are rows of padding. `processors` decides how many splits there are."""
    arena, module = Arena(device), load("decode_attention", SLIDING=sliding)
    first_seen = [length - window if window else 0 for length in lengths]
    kv = paged(arena, dtype, kv_heads, head_dim, page_size, lengths, first_seen, index, shuffle)
    q = arena.put(_normal(12, len(lengths), heads, head_dim, dtype=dtype, outlier=1.0))
    kv_lens = arena.put(torch.tensor(lengths, dtype=index))
    scale = head_dim**-0.5
    most = kv.tables.shape[1] * page_size
    blocks = -(-min(window or most, most) // (64 if head_dim * dtype.itemsize <= 256 else 32))
    splits = module._num_splits(len(lengths) * kv_heads, blocks, processors)
    kernels = ["_decode_split_kernel", "_decode_join_kernel"] if splits > 1 else ["_decode_split_kernel"]
    with arena.watch(kernels), mock.patch.object(module, "num_processors", return_value=processors):
        out = module.decode_attention(
            q, kv.k_pages, kv.v_pages, kv.tables, kv_lens, scale, *([window] if sliding else [])
        )
    assert out.shape == (len(lengths), heads * head_dim)
    for i, length in enumerate(lengths):
        row = out[i].view(1, heads, head_dim)
        if length == 0:
            assert not row.any(), "a row of padding is not 0"
        else:
            want = oracle.attention(q[i : i + 1].cpu(), kv.k[i], kv.v[i], scale, window)
            assert_close(f"decode, length {length}", row, want, dtype)


def check_prefill(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    sequences: Sequence[tuple[int, int]],
    window: int | None = None,
    sliding: bool = False,
    index: torch.dtype = torch.int32,
    shuffle: bool = True,
    trees: Sequence[Sequence[int]] | None = None,
) -> None:
    """`sequences`: cached and new tokens of each; `trees`: the new tokens' parents among themselves, or -1."""
    arena, module = Arena(device), load("prefill_attention", SLIDING=sliding)
    lengths = [prefix + new for prefix, new in sequences]
    first_seen = [prefix - window + 1 if window else 0 for prefix, _ in sequences]
    kv = paged(arena, dtype, kv_heads, head_dim, page_size, lengths, first_seen, index, shuffle)
    starts = [0]
    for _, new in sequences:
        starts.append(starts[-1] + new)
    q = arena.put(_normal(13, starts[-1], heads, head_dim, dtype=dtype, outlier=1.0))
    q_starts, kv_lens = (arena.put(torch.tensor(x, dtype=index)) for x in (starts, lengths))
    most, scale = max(new for _, new in sequences), head_dim**-0.5
    rest = ([window] if sliding else []) + ([arena.put(subtrees(trees, index))] if trees else [])
    with arena.watch(["_prefill_kernel"]):
        out = module.prefill_attention(q, kv.k_pages, kv.v_pages, kv.tables, q_starts, kv_lens, most, scale, *rest)
    assert out.shape == (starts[-1], heads * head_dim)
    for i, (prefix, new) in enumerate(sequences):
        rows = slice(starts[i], starts[i + 1])
        want = oracle.attention(q[rows].cpu(), kv.k[i], kv.v[i], scale, window, trees[i] if trees else None)
        assert_close(f"prefill of {new} after {prefix}", out[rows].view(new, heads, head_dim), want, dtype)


def subtrees(trees: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """[n, 3]: each token's depth, and where its subtree starts and ends in its tree's depth-first order."""
    rows = []
    for parents in trees:
        paths = [oracle.path(parents, node) for node in range(len(parents))]
        order = sorted(paths)
        for path in paths:
            first, size = order.index(path), sum(other[: len(path)] == path for other in paths)
            rows.append((len(path) - 1, first, first + size))
    return torch.tensor(rows, dtype=dtype)


def random_tree(seed: int, size: int) -> list[int]:
    """Parents of its tokens. Some follow the one before, others any, or none."""
    random = Random(seed)
    return [random.choice([node - 1, random.randrange(-1, node)]) for node in range(size)]


def check_last_page(device: torch.device) -> None:
    """Five tokens in a cache's last page, whose offset does not fit 32 bits (on a GPU, where it takes 8.6 GB)."""
    heads, head_dim, page_size, n, dtype = 8, 128, 16, 5, torch.bfloat16
    pages = 2 + (2**31 // (page_size * heads * head_dim) if device.type == "cuda" else 0)
    k_pages, v_pages = (torch.empty(pages, page_size, heads, head_dim, dtype=dtype, device=device) for _ in "kv")
    qkv = _normal(14, n, 3 * heads * head_dim, dtype=dtype, outlier=1.0).to(device)
    cos = torch.ones(n, head_dim // 2, device=device)
    slots = torch.arange(n, device=device) + (pages - 1) * page_size
    flags = dict.fromkeys(("QK_NORM", "ONE_PLUS", "LOGN", "PARTIAL_ROTARY"), False)
    q = load("qkv", **flags).rotate_and_cache(qkv, cos, 0 * cos, k_pages, v_pages, slots)
    x_q, x_k, x_v = qkv.cpu().view(n, 3, heads, head_dim).unbind(1)
    want, magnitude = oracle.attention(x_q, x_k, x_v, 0.1, None)
    table, starts = torch.tensor([[pages - 1]], device=device), torch.tensor([0, n], device=device)
    pages_and_table = k_pages, v_pages, table
    out = load("prefill_attention", SLIDING=False).prefill_attention(q, *pages_and_table, starts, starts[1:], n, 0.1)
    assert_close("prefill, last page", out.view(n, heads, head_dim), (want, magnitude), dtype)
    out = load("decode_attention", SLIDING=False).decode_attention(q[-1:], *pages_and_table, starts[1:], 0.1)
    assert_close("decode, last page", out.view(1, heads, head_dim), (want[-1:], magnitude[-1:]), dtype)


def check_all(device: torch.device) -> None:
    """A fixed set of cases that covers every branch of every kernel, in every dtype."""
    for dtype in TOLERANCE:
        for one_plus in (False, True):
            check_norm(device, dtype, n=3, size=96, one_plus=one_plus)
        for activation in ("silu", "relu", "gelu", "gelu_tanh"):
            check_activation(device, dtype, n=3, size=83, activation=activation)
        for rotary_dim, tables, qk_norm, one_plus, logn in (
            (16, torch.float32, False, False, False),
            (16, dtype, True, False, False),
            (16, dtype, True, True, True),
            (8, torch.float32, True, True, False),
            (12, dtype, True, False, True),
            (4, torch.float32, False, False, True),
        ):
            check_rotate(device, dtype, 3, 3, 1, 16, rotary_dim, tables, qk_norm, one_plus, logn)
        check_decode(device, dtype, 4, 2, 16, 4, lengths=(1, 0, 70, 131))
        check_decode(device, dtype, 2, 2, 24, 16, lengths=(1, 9, 10, 11, 80), window=10, sliding=True)
        check_prefill(device, dtype, 4, 2, 16, 4, sequences=((0, 5), (70, 1), (3, 66)))
        check_prefill(device, dtype, 2, 1, 24, 16, sequences=((0, 11), (75, 20), (9, 1)), window=10, sliding=True)
        trees = [random_tree(seed, size) for seed, size in enumerate((9, 1, 70))]
        check_prefill(device, dtype, 4, 2, 16, 4, sequences=((30, 9), (3, 1), (0, 70)), trees=trees)
        check_prefill(device, dtype, 2, 1, 24, 16, ((30, 9), (3, 1), (90, 70)), window=6, sliding=True, trees=trees)
    check_norm(device, torch.float32, n=1, size=1, one_plus=False)
    check_norm(device, torch.float32, n=2, size=5120, one_plus=False)
    check_activation(device, torch.float32, n=2, size=3 * 1024 + 8, activation="silu")
    for heads, kv_heads, head_dim in ((2, 2, 8), (7, 1, 80), (14, 2, 64), (1, 1, 256), (40, 2, 16)):
        check_rotate(device, torch.float32, 2, heads, kv_heads, head_dim, head_dim, torch.float32, True, False, False)
        check_decode(device, torch.float32, heads, kv_heads, head_dim, 16, lengths=(16, 33), processors=3)
        check_prefill(device, torch.float32, heads, kv_heads, head_dim, 16, sequences=((16, 16), (0, 3)))
    check_last_page(device)
    # One split writes the output itself; many splits stay empty.
    check_decode(device, torch.float32, 4, 2, 16, 4, lengths=(5, 130), processors=1)
    check_decode(device, torch.float32, 4, 2, 16, 4, lengths=(200, 0, 1), processors=600)
    check_decode(device, torch.float32, 4, 2, 16, 4, lengths=(5, 90), sliding=True, index=torch.int64, shuffle=False)
    check_prefill(device, torch.float32, 2, 1, 16, 4, ((0, 140), (150, 3)), index=torch.int64, shuffle=False)
    check_prefill(device, torch.float32, 2, 1, 16, 4, ((0, 9), (60, 70)), sliding=True)
    tree = [random_tree(3, 40)]
    check_prefill(device, torch.float32, 2, 1, 16, 4, ((25, 40),), sliding=True, index=torch.int64, trees=tree)
