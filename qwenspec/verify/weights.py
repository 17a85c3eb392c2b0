"""Random weights that make mistakes show, and checkpoints of them.

They follow from the spec and its layout alone, as the reference reads them, and share nothing with `qwenspec.ir`.

Parts that lie in one matrix have magnitudes of their own, so that parts which are swapped show. Channels of the
residual stream, of the values and of the MLP are outliers, as they are in trained models, and as there what reads
them makes up for it: every other channel still counts, nothing grows from layer to layer, and no softmax saturates.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from qwenspec.diagnostics import SpecError
from qwenspec.hf.exporter import export_config
from qwenspec.spec.document import Spec
from qwenspec.spec.kv_cache import Fp8KvCache
from qwenspec.spec.quantization import Awq, Gptq, Int4, PackQuantized
from qwenspec.verify.dequantize import quantized_matrices
from qwenspec.verify.quantize import quantized

Float32 = npt.NDArray[np.float32]
Noise = Callable[..., Float32]  # shape -> normal noise

GAIN = {"q": 1.0, "k": 1.5, "v": 0.5, "o": 0.8, "gate": 1.5, "up": 0.6, "down": 0.8, "head": 1.0}
# Where weights are quantised, parts that may lie in one matrix are more than 100 times apart, for their scales to show;
# the products that count stay as they are.
APART = {"q": 16.0, "k": 1 / 16, "v": 1 / 16, "o": 16.0, "up": 1 / 64, "down": 64.0}
BIAS = 0.4  # of the matrix's gain
_SMALLEST = 2.0**-14  # float16's smallest normal number: from there on it holds what bfloat16 does


def random_weights(spec: Spec, seed: int) -> dict[str, Float32]:
    """Every tensor that the reference reads: checkpoint name -> values that float16 and bfloat16 hold exactly.

    A tensor's noise follows from the seed, its place in the model and its shape alone: it stays as it is when other
    parts of the model go, or when the layout fuses differently."""
    return {tensor.name: _exact(tensor.values(seed)) for tensor in _tensors(spec)}


def stored_weights(spec: Spec, seed: int) -> dict[str, npt.NDArray[Any]]:
    """The random weights as a checkpoint has them: quantised where the spec says so."""
    return quantized(spec, random_weights(spec, seed), seed)


def save_checkpoint(
    spec: Spec, weights: Mapping[str, npt.NDArray[Any]], folder: Path, dtype: str, shards: int = 1
) -> None:
    """Write `shards` safetensors files in `dtype`, with an index when there are several, and config.json if Hugging
    Face has a model like the spec. The folder is made if it is not there. What quantised modules store keeps the dtype
    that it has."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    where = {name: files[i % shards] for i, name in enumerate(weights)}
    for file in files:
        _write_safetensors({name: weights[name] for name in weights if where[name] == file}, folder / file, dtype)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}, indent=1))
    with contextlib.suppress(SpecError):
        (folder / "config.json").write_text(json.dumps(export_config(spec), indent=2))


def to_bfloat16(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers, ties to even. Values must be finite."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return rounded


def _write_safetensors(tensors: Mapping[str, npt.NDArray[Any]], file: Path, dtype: str) -> None:
    """The header's length in 8 bytes, the header, the data: written here, as safetensors' NumPy interface has no
    bfloat16, and what is below it changes from version to version."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, start = [], 0
    for name, values in tensors.items():
        own = values.dtype.name not in ("float32", "float64") or name.endswith(SCALES)
        kept = values.dtype.name if own else dtype
        data.append((values if own else _in_dtype(values, dtype)).tobytes())
        end = start + len(data[-1])
        header[name] = {"dtype": _STORED_AS[kept], "shape": list(values.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def _in_dtype(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    return to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)


SCALES = (".scales", ".weight_scale", ".weight_scale_inv", ".input_scale")  # whose dtype is their own
_STORED_AS = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
}


# ------------------------------------------------------------------------------------------------ the tensors


@dataclass(frozen=True)
class _Tensor:
    """A checkpoint tensor and its parts, top row first: each the key of its noise, and its values from noise."""

    name: str
    parts: tuple[tuple[str, Callable[[Noise], Float32]], ...]

    def values(self, seed: int) -> Float32:
        return np.concatenate([make(_noise(seed, key)) for key, make in self.parts])


@dataclass(frozen=True)
class _Part:
    """The rows of one projection; `large_…`: some rows or columns, and how many times larger they are."""

    role: str
    rows: int
    gain: float
    large_rows: tuple[tuple[int, float], ...] = ()
    large_columns: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class _Linear:
    """A linear layer of a decoder layer: its parts, top row first; a module each, or one for all."""

    modules: tuple[str, ...]
    parts: tuple[_Part, ...]
    columns: int
    bias: bool


def _tensors(spec: Spec) -> Iterator[_Tensor]:
    arch, layout = spec.architecture, spec.layout
    vocab, hidden, layers = arch.vocab_size, arch.hidden_size, arch.num_hidden_layers
    one_plus, names = arch.norm.weight == "one_plus", layout.attention
    large = _outliers(spec)
    yield _Tensor(f"{layout.embedding}.weight", (("embedding", _maker(_embedding, vocab, hidden, large.stream)),))
    for i in range(layers):
        name, address = layout.layer.format(i=i), f"layers.{i}"
        yield _norm(f"{name}.{layout.input_norm}", f"{address}.input_norm", hidden, one_plus, _of_stream(large, 2 * i))
        if arch.attention.qk_norm == "per_head":
            yield _norm(f"{name}.{names.q_norm}", f"{address}.q_norm", head_dim(spec), one_plus)
            yield _norm(f"{name}.{names.k_norm}", f"{address}.k_norm", head_dim(spec), one_plus)
        after = _of_stream(large, 2 * i + 1)
        yield _norm(f"{name}.{layout.post_attention_norm}", f"{address}.post_attention_norm", hidden, one_plus, after)
        for linear in _linears(spec):
            yield from _of_linear(linear, name, address)
        if isinstance(spec.kv_cache, Fp8KvCache) and spec.kv_cache.scales == "checkpoint":
            for part in "kv":
                make = _maker(_kv_scale, _gains(spec)[part])
                yield _Tensor(f"{name}.{names.kv_scales}.{part}_scale", ((f"{address}.{part}_scale", make),))
    has_head = arch.embedding is None
    last = _of_stream(large, 2 * layers, tied_head=has_head and arch.tie_word_embeddings)
    yield _norm(layout.norm, "norm", hidden, one_plus, last)
    if has_head and not arch.tie_word_embeddings:
        yield _Tensor(
            f"{layout.lm_head}.weight", (("head", _maker(_matrix, _Part("head", vocab, GAIN["head"]), hidden)),)
        )


def _linears(spec: Spec) -> tuple[_Linear, ...]:
    """The linear layers of each layer. What makes a channel large is taken back where the channel is read."""
    arch, attention, mlp = spec.architecture, spec.layout.attention, spec.layout.mlp
    hidden, inner, bias = arch.hidden_size, arch.intermediate_size, arch.attention.bias
    heads, kv_heads, width = arch.num_attention_heads, arch.num_key_value_heads, head_dim(spec)
    q, kv = heads * width, (kv_heads or heads) * width
    value, readers = _large_value(width, kv, heads * width // kv)
    large, small = min(5, inner - 1), _channel(inner)
    outliers, gain = _outliers(spec), _gains(spec)
    row, column = outliers.row, outliers.column
    v = _Part("v", kv, gain["v"], large_rows=((value, row),))
    o = _Part("o", hidden, gain["o"], large_columns=tuple((reader, 1 / row) for reader in readers))
    up = _Part("up", inner, gain["up"], large_rows=((large, row), (small, 1 / column)))
    down = _Part("down", hidden, gain["down"], large_columns=((large, 1 / row), (small, column)))
    return (
        _Linear(attention.qkv, (_Part("q", q, gain["q"]), _Part("k", kv, gain["k"]), v), hidden, bias.qkv),
        _Linear((attention.o,), (o,), q, bias.output),
        _Linear(mlp.gate_up, (_Part("gate", inner, gain["gate"]), up), hidden, arch.mlp.bias),
        _Linear((mlp.down,), (down,), inner, arch.mlp.bias),
    )


def _gains(spec: Spec) -> dict[str, float]:
    quantized = spec.quantization is not None
    return {role: gain * APART.get(role, 1.0) if quantized else gain for role, gain in GAIN.items()}


@dataclass(frozen=True)
class _Outliers:
    """How many times larger they are."""

    stream: float  # a channel of the embedding
    column: float  # one that `down` reads
    row: float  # a row of v, and one of up


def _outliers(spec: Spec) -> _Outliers:
    """Where 4 bits hold a group of weights, one that is 40 times larger leaves nothing of the others."""
    narrow = isinstance(spec.quantization, Awq | Int4) or (
        isinstance(spec.quantization, Gptq | PackQuantized) and spec.quantization.bits == 4
    )
    held = quantized_matrices(spec).get(spec.layout.embedding)
    stream = 4.0 if held is not None and isinstance(held.scheme, Int4) else 40.0
    return _Outliers(stream, 4.0, 3.0) if narrow else _Outliers(stream, 40.0, 10.0)


def _large_value(width: int, rows: int, group: int) -> tuple[int, list[int]]:
    """A row of v, and the columns of o that read it: one for each query head of the group."""
    row = min(5, rows - 1)
    head, channel = divmod(row, width)
    return row, [query * width + channel for query in range(head * group, (head + 1) * group)]


def head_dim(spec: Spec) -> int:
    """The width of a head, written or derived."""
    arch = spec.architecture
    return arch.attention.head_dim or arch.hidden_size // arch.num_attention_heads


def _of_linear(linear: _Linear, name: str, address: str) -> Iterator[_Tensor]:
    held = [linear.parts] if len(linear.modules) == 1 else [(part,) for part in linear.parts]
    for module, parts in zip(linear.modules, held, strict=True):
        matrices = ((f"{address}.{part.role}", _maker(_matrix, part, linear.columns)) for part in parts)
        yield _Tensor(f"{name}.{module}.weight", tuple(matrices))
        if linear.bias:
            biases = ((f"{address}.{part.role}.bias", _maker(_bias, part)) for part in parts)
            yield _Tensor(f"{name}.{module}.bias", tuple(biases))


def _norm(module: str, key: str, size: int, one_plus: bool, scale: Callable[[int], Float32] | None = None) -> _Tensor:
    """A norm's weight: [size]. `scale` of the size: what it is multiplied by, channel by channel."""

    def values(noise: Noise) -> Float32:
        weight: Float32 = np.exp(0.4 * noise(size) - 0.16)  # mean square 1
        weight = weight if scale is None else weight * scale(size)
        return weight - 1 if one_plus else weight

    return _Tensor(f"{module}.weight", ((key, values),))


def _of_stream(outliers: _Outliers, sublayers: int, tied_head: bool = False) -> Callable[[int], Float32]:
    """For a norm after so many sublayers: the outlier is most of the root mean square of the residual stream, and what
    it takes from the other channels is given back to them; itself it is made as small as they are."""

    def scale(size: int) -> Float32:
        others = 1 + 0.5 * sublayers  # mean square; each sublayer adds about so much
        weight = np.full(size, math.sqrt((outliers.stream**2 + (size - 1) * others) / size / others), np.float32)
        # A tied head is an embedding: its channel is an outlier too.
        weight[_channel(size)] /= outliers.stream * (10.0 if tied_head else 1.0)
        return weight

    return scale


def _maker(make: Callable[..., Float32], *arguments: Any) -> Callable[[Noise], Float32]:
    return lambda noise: make(noise, *arguments)


# ------------------------------------------------------------------------------------------------- the values


def _noise(seed: int, key: str) -> Noise:
    generator = np.random.default_rng([seed, crc32(key.encode())])
    return lambda *shape: generator.standard_normal(shape, dtype=np.float32)


def _channel(size: int) -> int:
    """The channel that is the outlier, of so many."""
    return min(3, size - 1)


def _embedding(noise: Noise, vocab: int, hidden: int, outlier: float) -> Float32:
    values, spread = noise(vocab, hidden), noise(vocab)
    # Always large, or some tokens would be all outlier and others have none.
    channel = _channel(hidden)
    values[:, channel] = outlier * np.sign(values[:, channel]) * np.exp(0.2 * spread)
    return values


def _matrix(noise: Noise, part: _Part, columns: int) -> Float32:
    """[rows, columns] that keep a unit input's size, times the part's gain."""
    values = noise(part.rows, columns) * np.float32(part.gain / math.sqrt(columns))
    for row, factor in part.large_rows:
        values[row] *= factor
    for column, factor in part.large_columns:
        values[:, column] *= factor
    return values


def _bias(noise: Noise, part: _Part) -> Float32:
    return noise(part.rows) * np.float32(BIAS * part.gain)


def _kv_scale(noise: Noise, gain: float) -> Float32:
    """[1]: now and then a key or a value is larger than 448 times it."""
    scale: Float32 = np.exp(0.3 * noise(1)) * np.float32(0.01 * gain)
    return scale


def _exact(values: Float32) -> Float32:
    """Rounded to bfloat16, and to zero below what float16 holds."""
    rounded = (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    rounded[np.abs(rounded) < _SMALLEST] = 0
    return rounded
