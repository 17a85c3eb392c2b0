"""Each kernel with a quantised KV cache against the float64 oracle, on any device, as kernel_checks has the others."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import kernel_checks as checks
import kernel_oracle as oracle
import kv_oracle
import torch
import triton
import triton.language as tl
from kernel_checks import EPS, TOLERANCE, Arena, Paged
from kernel_variants import load
from torch import Tensor

KV = ("int8", "fp8", "fp8_stored")
STORED_SCALES = 0.4, 0.3  # of keys and values, whose largest is about 40 · 4
E4M3 = load("e4m3", "fp8")
encode, decode = E4M3.encode, E4M3.decode


@triton.jit
def _e4m3_kernel(x_ptr, code_ptr, codes_ptr, value_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(code_ptr + i, encode(tl.load(x_ptr + i)))
    tl.store(value_ptr + i, decode(tl.load(codes_ptr + i)))


def check_e4m3(device: torch.device) -> None:
    """Every byte; every number, middle between two and their neighbours in float32; what is out of range."""
    finite = kv_oracle.e4m3_values()[:127]
    edges = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, torch.tensor([448.5, 464.0, 480.0, 1e9, 1e-40])])
    edges = edges.float()
    inf = torch.tensor(torch.inf)
    x = torch.cat(
        [edges, torch.nextafter(edges, inf), torch.nextafter(edges, -inf), inf[None], torch.tensor([torch.nan])]
    )
    x = torch.cat([x, -x])
    size = triton.next_power_of_2(len(x))
    x = torch.cat([x, torch.zeros(size - len(x))])
    codes = torch.arange(256, dtype=torch.uint8).repeat(size // 256)
    if checks.runs_kernels(device):
        code, value = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, device=device)
        _e4m3_kernel[(1,)](x.to(device), code, codes.to(device), value, N=size)
    else:
        code, value = E4M3.encode_torch(x), E4M3.decode_torch(codes)
    differ = (code.cpu() != kv_oracle.to_e4m3(x)) & ~x.isnan()
    assert not differ.any(), f"{x[differ][:3]} became {code.cpu()[differ][:3]}"
    assert bool((code.cpu()[x.isnan()] & 0x7F == 0x7F).all())
    want = kv_oracle.from_e4m3(codes)
    assert torch.equal(value.cpu().double()[~want.isnan()] * 256, want[~want.isnan()])
    assert bool((value.cpu()[want.isnan()].abs() == 1.875).all())


def quantized(x: Tensor, kv: str, stored: float) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, scales as the cache has them, and what both stand for in float64. Where x is NaN, bytes are 127."""
    scale = torch.tensor([stored]) if kv == "fp8_stored" else kv_oracle.token_scales(x, kv)
    spread = scale if kv == "fp8_stored" else scale.unsqueeze(-1)
    codes = kv_oracle.quantize(x, kv, spread)
    return codes.masked_fill_(x.isnan(), 127), scale, kv_oracle.dequantize(codes, kv, spread)


def check_cache(device: torch.device, dtype: torch.dtype, kv: str, head_dim: int) -> None:
    """Without norm and rotation keys are what they were, so that every bit of the cache is known: outlier channels,
    a head of zeros, numbers between two bytes, tiny and huge ones, NaN; a token that is not cached."""
    heads, kv_heads, n, page_size, pages = 2, 2, 7, 4, 4
    arena = Arena(device)
    qkv = checks._normal(30, n, heads + 2 * kv_heads, head_dim, dtype=dtype)
    middles = torch.tensor([17.0, 2.0**-10, 3 * 2.0**-10, 0.5, 1.5, -2.5, 1.0])
    for part in (heads, heads + kv_heads):  # the first key head and the first value head
        qkv[0, part] = 0
        largest = torch.tensor([127.0 if kv == "int8" else 448.0])  # so that the scale is 1
        qkv[1, part] = torch.cat([largest, middles]).repeat(head_dim)[:head_dim].to(dtype)
        if dtype == torch.float32:
            qkv[6, part] = qkv[1, part] * 1013  # whose reciprocal is no float32
        qkv[2, part, [1, 1 + head_dim // 2]] = torch.nan  # a pair that is rotated
        qkv[3, part] *= 2.0**-20
        qkv[4, part] = qkv[4, part].sign() * 6e4
    slots = torch.tensor([9, 4, 15, 6, 7, -1, 12])
    cache = _empty_cache(arena, kv, (pages, page_size, kv_heads, head_dim))
    before = [x.clone() for x in cache]
    tables = arena.put(torch.ones(n, head_dim // 2)), arena.put(torch.zeros(n, head_dim // 2))
    flags = dict.fromkeys(("QK_NORM", "ONE_PLUS", "LOGN", "PARTIAL_ROTARY"), False)
    with arena.watch(["_rotate_and_cache_kernel"]):
        q = load("qkv", kv, **flags).rotate_and_cache(arena.put(qkv.flatten(1)), *tables, *cache, arena.put(slots))
    assert torch.equal(q.cpu(), qkv[:, :heads])
    kept = slots >= 0
    for i, part in enumerate(qkv[:, heads:].split(kv_heads, dim=1)):
        codes, scales, values = quantized(part[kept], kv, STORED_SCALES[i])
        rows = cache[i].cpu().view(-1, kv_heads, head_dim)
        got = rows[slots[kept]]
        if kv == "fp8_stored":
            known = ~part[kept].isnan()
            assert bool((got[~known] & 0x7F == 0x7F).all()), "NaN is lost"
        else:
            got_scales = cache[2 + i].cpu().view(-1, kv_heads)
            torch.testing.assert_close(got_scales[slots[kept]], scales, rtol=0, atol=0, equal_nan=True)
            untouched = torch.ones(pages * page_size, dtype=torch.bool)
            untouched[slots[kept]] = False
            assert bool(got_scales[untouched].isnan().all()), "scales went to slots of no token"
            known = ~scales.isnan().unsqueeze(-1).expand_as(got)
        differ = (got != codes) & known
        assert not differ.any(), f"{'kv'[i]}: {got[differ][:3]}, not {codes[differ][:3]}: {values[differ][:3]}"
        untouched = torch.ones(len(rows), dtype=torch.bool)
        untouched[slots[kept]] = False
        assert torch.equal(rows[untouched], before[i].cpu().view_as(rows)[untouched]), "bytes went to slots of no token"


def _empty_cache(arena: Arena, kv: str, shape: tuple[int, ...]) -> list[Tensor]:
    """Pages and scales, as kernels take them."""
    dtype = torch.int8 if kv == "int8" else torch.uint8
    pages = [arena.empty(shape, dtype) for _ in "kv"]
    if kv == "fp8_stored":
        return pages + [arena.put(torch.tensor([scale])) for scale in STORED_SCALES]
    return pages + [arena.empty(shape[:-1], torch.float32) for _ in "kv"]


def check_rotate(
    device: torch.device,
    dtype: torch.dtype,
    kv: str,
    n: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    qk_norm: bool,
    one_plus: bool,
    logn: bool,
) -> None:
    """What is cached is what the kernel without quantisation caches, quantised; the queries are the same."""
    flags = {"QK_NORM": qk_norm, "ONE_PLUS": one_plus, "LOGN": logn, "PARTIAL_ROTARY": rotary_dim < head_dim}
    arena, shape = Arena(device), (-(-n // 4) + 1, 4, kv_heads, head_dim)
    angles = torch.rand(n, rotary_dim // 2, generator=torch.Generator().manual_seed(6)) * 100
    qkv = checks._normal(31, n, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    tensors = [arena.put(x) for x in (qkv, angles.cos(), angles.sin())]
    slots = arena.put(torch.randperm(shape[0] * 4, generator=torch.Generator().manual_seed(7))[:n])
    rest: list[object] = (
        [arena.put(checks._weight(seed, head_dim, dtype)) for seed in (8, 9)] + [EPS] if qk_norm else []
    )
    if logn:
        rest.append(arena.put(1 + torch.rand(n, generator=torch.Generator().manual_seed(10))))
    cache, plain = _empty_cache(arena, kv, shape), [arena.empty(shape, dtype) for _ in "kv"]
    with arena.watch(["_rotate_and_cache_kernel"] * 2):
        q = load("qkv", kv, **flags).rotate_and_cache(*tensors, *cache, slots, *rest)
        want_q = load("qkv", **flags).rotate_and_cache(*tensors, *plain, slots, *rest)
    most = 0.01 if device.type == "cuda" else 0.0  # there two kernels may differ in a last bit
    assert _differing(q, want_q) <= most
    for i in range(2):
        codes, scales, _ = quantized(plain[i].cpu().flatten(0, 1)[slots.cpu()], kv, STORED_SCALES[i])
        assert _differing(cache[i].flatten(0, 1)[slots], codes) <= most
        if kv != "fp8_stored":
            assert _differing(cache[2 + i].flatten(0, 1)[slots], scales) <= most


def _differing(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.cpu() != want.cpu()).double().mean())


# ----------------------------------------------------------------------------------------------------- attention


def cached(arena: Arena, made: Paged, kv: str, lengths: Sequence[int]) -> tuple[list[Tensor], list[oracle.Result]]:
    """The pages quantised, and each sequence's keys and values as they are then. The last token's first head is 0."""
    for i, length in enumerate(lengths):
        if length:
            page_size = made.k_pages.shape[1]
            last = int(made.tables[i, (length - 1) // page_size]), (length - 1) % page_size, 0
            for rows, pages in ((made.k[i], made.k_pages), (made.v[i], made.v_pages)):
                rows[length - 1, 0], pages[last] = 0, 0
    tensors, scales = [], []
    for pages, stored in zip((made.k_pages, made.v_pages), STORED_SCALES, strict=True):
        codes, scale, _ = quantized(pages.cpu(), kv, stored)
        tensors.append(arena.put(codes))
        scales.append(arena.put(scale))
    rows = [
        tuple(quantized(x, kv, s)[2] for x, s in zip(pair, STORED_SCALES, strict=True))
        for pair in zip(made.k, made.v, strict=True)
    ]
    return tensors + scales, rows


def assert_close(name: str, got: Tensor, expected: oracle.Result, dtype: torch.dtype) -> None:
    if checks.runs_kernels(got.device):
        checks.assert_close(name, got, expected, dtype)
    else:  # nothing but the output is rounded to the dtype
        want, magnitude = expected
        allowed = torch.finfo(dtype).eps / 2 * want.abs() + TOLERANCE[torch.float32] * magnitude
        assert bool(((got.double() - want).abs() <= allowed + 1e-7).all()), f"{name} {dtype}"


def check_decode(
    device: torch.device,
    dtype: torch.dtype,
    kv: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    lengths: Sequence[int],
    window: int | None = None,
    sliding: bool = False,
    processors: int = 8,
) -> None:
    """`lengths` of 0 are rows of padding. `processors` decides how many splits there are."""
    arena, module = Arena(device), load("decode_attention", kv, SLIDING=sliding)
    first_seen = [length - window if window else 0 for length in lengths]
    made = checks.paged(arena, dtype, kv_heads, head_dim, page_size, lengths, first_seen, torch.int32, True)
    cache, rows = cached(arena, made, kv, lengths)
    q = arena.put(checks._normal(12, len(lengths), heads, head_dim, dtype=dtype, outlier=1.0))
    kv_lens, scale = arena.put(torch.tensor(lengths, dtype=torch.int32)), head_dim**-0.5
    with mock.patch.object(module, "num_processors", return_value=processors):
        out = module.decode_attention(q, *cache, made.tables, kv_lens, scale, *([window] if sliding else []))
    arena.check()
    for i, length in enumerate(lengths):
        row = out[i].view(1, heads, head_dim)
        if length == 0:
            assert not row.any(), "a row of padding is not 0"
        else:
            want = oracle.attention(q[i : i + 1].cpu(), *rows[i], scale, window)
            assert_close(f"decode {kv}, length {length}", row, want, dtype)


def check_prefill(
    device: torch.device,
    dtype: torch.dtype,
    kv: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    sequences: Sequence[tuple[int, int]],
    window: int | None = None,
    sliding: bool = False,
    trees: Sequence[Sequence[int]] | None = None,
) -> None:
    """`sequences`: cached and new tokens of each; `trees`: the new tokens' parents among themselves, or -1."""
    arena, module = Arena(device), load("prefill_attention", kv, SLIDING=sliding)
    lengths = [prefix + new for prefix, new in sequences]
    first_seen = [prefix - window + 1 if window else 0 for prefix, _ in sequences]
    made = checks.paged(arena, dtype, kv_heads, head_dim, page_size, lengths, first_seen, torch.int32, True)
    cache, rows = cached(arena, made, kv, lengths)
    starts = [sum(new for _, new in sequences[:i]) for i in range(len(sequences) + 1)]
    q = arena.put(checks._normal(13, starts[-1], heads, head_dim, dtype=dtype, outlier=1.0))
    q_starts, kv_lens = (arena.put(torch.tensor(x, dtype=torch.int32)) for x in (starts, lengths))
    most, scale = max(new for _, new in sequences), head_dim**-0.5
    rest = [window] if sliding else []
    tree = [arena.put(checks.subtrees(trees, torch.int32))] if trees else []
    with arena.watch(["_prefill_kernel"]):
        out = module.prefill_attention(q, *cache, made.tables, q_starts, kv_lens, most, scale, *rest, *tree)
    for i, (prefix, new) in enumerate(sequences):
        part = slice(starts[i], starts[i + 1])
        want = oracle.attention(q[part].cpu(), *rows[i], scale, window, trees[i] if trees else None)
        assert_close(f"prefill {kv} of {new} after {prefix}", out[part].view(new, heads, head_dim), want, dtype)


def check_nan(device: torch.device, kv: str) -> None:
    """A NaN among a token's values shows in its own head alone, and in the other values only of a token's scale."""
    arena, heads, head_dim = Arena(device), 2, 16
    made = checks.paged(arena, torch.float32, heads, head_dim, 4, [6], [0], torch.int32, False)
    made.v_pages[made.tables[0, 1], 1, 0, 3] = torch.nan
    cache, _ = cached(arena, made, kv, [0])
    q = arena.put(checks._normal(12, 1, heads, head_dim, dtype=torch.float32))
    arguments = cache[0], cache[1], cache[2], cache[3], made.tables
    one = arena.put(torch.tensor([6], dtype=torch.int32))
    decoded = load("decode_attention", kv, SLIDING=False).decode_attention(q, *arguments, one, 0.25)
    starts = arena.put(torch.tensor([0, 1], dtype=torch.int32))
    prefilled = load("prefill_attention", kv, SLIDING=False).prefill_attention(q, *arguments, starts, one, 1, 0.25)
    for out in (decoded, prefilled):
        nan = out.view(heads, head_dim).isnan()
        assert not nan[1].any()
        assert nan[0].sum() == (1 if kv == "fp8_stored" else head_dim)
        assert bool(nan[0, 3])


def check_all(device: torch.device) -> None:
    """A fixed set of cases that covers every branch of every kernel."""
    check_e4m3(device)
    for kv in KV:
        check_nan(device, kv)
        for dtype in TOLERANCE:
            check_cache(device, dtype, kv, 24)
            check_decode(device, dtype, kv, 4, 2, 16, 4, lengths=(1, 0, 131))
            check_prefill(device, dtype, kv, 2, 1, 16, 4, sequences=((3, 5), (70, 1)))
        check_rotate(device, torch.bfloat16, kv, 3, 3, 1, 16, 16, True, False, False)
        check_rotate(device, torch.bfloat16, kv, 3, 5, 2, 24, 12, True, True, True)
        check_rotate(device, torch.float32, kv, 2, 2, 2, 64, 16, False, False, False)
        check_decode(device, torch.float16, kv, 2, 2, 24, 16, (9, 10, 80), window=10, sliding=True)
        check_decode(device, torch.float32, kv, 14, 2, 64, 16, (16, 33), processors=1)
        check_prefill(device, torch.float16, kv, 2, 2, 24, 16, ((0, 11), (40, 30)), window=10, sliding=True)
        trees = [checks.random_tree(seed, size) for seed, size in enumerate((9, 30))]
        check_prefill(device, torch.float32, kv, 2, 1, 16, 4, ((30, 9), (0, 30)), trees=trees)
        check_prefill(device, torch.bfloat16, kv, 2, 1, 24, 16, ((3, 9), (90, 30)), 6, True, trees=trees)
    check_prefill(device, torch.float32, "int8", 2, 1, 16, 4, ((3, 70),))  # more than a block of queries
