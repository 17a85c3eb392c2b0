"""What each of several ranks reads of a checkpoint: its rows and columns of every parameter, quantised or not."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from test_triton_quantized import ALL_LINEARS, BIASES, CASES, TIED, quantized_spec

from hf_parity.oracle import QWEN1, QWEN2, QWEN3, merge
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Model
from qwenspec.ir.shard import legal_degrees, mlp_unit, obstacles
from qwenspec.spec.document import Spec
from qwenspec.verify.weights import save_checkpoint, stored_weights

Array = npt.NDArray[Any]
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}  # two query heads each, and on 2 ranks three query heads
ODD = {"vocab_size": 97, "intermediate_size": 53}
MORE: dict[str, tuple[Any, dict[str, Any]]] = {
    "full precision": (None, merge(QWEN3, merge(BIASES, merge(HEADS, ODD)))),
    "full precision, fused on disk": (None, merge(QWEN1, ODD)),
    "full precision, tied": (None, merge(QWEN2, merge(TIED, HEADS))),
    "full precision, more ranks than features": (None, merge(QWEN3, merge(HEADS, {"intermediate_size": 5}))),
    "int8, heads cut between ranks": ({"scheme": "int8"}, merge(QWEN3, merge(BIASES, merge(HEADS, ODD)))),
    "int4, ragged groups": ({"scheme": "int4", "group_size": 8}, merge(QWEN3, merge(HEADS, {"intermediate_size": 53}))),
    "awq, heads of 8": (
        {"scheme": "awq", "group_size": 8, "skip": ALL_LINEARS[2:4]},
        merge(QWEN2, {"intermediate_size": 72, "attention": {"head_dim": 8}}),
    ),
}
ONE_RANK = {  # whose groups or blocks of inputs no two ranks can share
    "gptq, zero points, act order",
    "gptq, 8 bits, biases, zero points, act order",
    "fp8",
    "fp8, parts apart, biases",
}


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_each_rank_reads_its_share(case: str, tmp_path: Path) -> None:
    quantization, architecture = (CASES | MORE)[case]
    spec = quantized_spec(tmp_path, quantization, architecture)
    save_checkpoint(spec, stored_weights(spec, seed=1), tmp_path / "weights", "float32", shards=2)
    module = import_package(emit(spec, "triton", tmp_path))
    whole = parameters(module, tmp_path / "weights", 0, 1)
    model = lower(spec)
    degrees = legal_degrees(model)
    assert (degrees == (1,)) == (case in ONE_RANK)
    for degree in degrees:
        for rank in range(degree):
            found = parameters(module, tmp_path / "weights", rank, degree)
            assert found.keys() == whole.keys()
            for name, array in found.items():
                assert_share(name, array, whole[name], expected(spec, model, name, degree, rank))


def test_an_illegal_degree_has_the_reason_of_the_plan(tmp_path: Path) -> None:
    """From the package's manifest, word for word what `qwenspec plan` says."""
    for case in CASES | MORE:
        quantization, architecture = (CASES | MORE)[case]
        spec = quantized_spec(tmp_path, quantization, architecture)
        module = import_package(emit(spec, "triton", tmp_path / case.replace(",", "").replace(" ", "_")))
        shares = part(module, "shares")
        entries = json.loads((Path(str(module.__file__)).parent / "MANIFEST.json").read_text())["parameters"]
        for degree in range(9):
            said = obstacles(lower(spec), degree)
            assert shares.obstacles(shares.read_shared(entries), degree) == [problem.message for problem in said]
            if said:
                assert shares.explanation(shares.read_shared(entries)) == said[0].hint


# ------------------------------------------------------------------------------------------------- expectations


def expected(spec: Spec, model: Model, name: str, degree: int, rank: int) -> tuple[Sequence[int], Sequence[int]]:
    """The rows and columns of a parameter that are on a rank, -1 where there is room and nothing; by loops."""
    arch = spec.architecture
    (param,) = [p for p in model.params() if name.startswith(p.name.rpartition(".")[0]) and kind(name) == kind(p.name)]
    rows, columns = list(range(param.shape[0])), list(range(param.shape[1] if len(param.shape) > 1 else 1))
    module = param.name.split(".")[-2]
    head_dim = model.layers[0].mixer.head_dim
    queries = arch.num_attention_heads // degree
    own = range(rank * queries, (rank + 1) * queries)
    kv_heads = model.layers[0].mixer.num_kv_heads
    if module == "qkv_proj":
        slots = slots_of(arch.num_attention_heads, kv_heads, degree)[rank]
        of_heads, keys, size = dims(own, head_dim), dims(slots, head_dim), kv_heads * head_dim
        first = arch.num_attention_heads * head_dim
        parts = {"q": of_heads, "k": [first + row for row in keys], "v": [first + size + row for row in keys]}
        rows = parts_of(name, parts, {"q": 0, "k": first, "v": first + size})
    elif module == "gate_up_proj":
        features = mlp_features(model, arch.intermediate_size, degree, rank)
        up = [row + arch.intermediate_size if row >= 0 else -1 for row in features]
        rows = parts_of(name, {"gate": features, "up": up}, {"gate": 0, "up": arch.intermediate_size})
    elif module == "o_proj" and kind(name) == "weight":
        columns = dims(own, head_dim)
    elif module == "down_proj" and kind(name) == "weight":
        columns = mlp_features(model, arch.intermediate_size, degree, rank)
    elif module in ("o_proj", "down_proj"):
        rows = rows if rank == 0 else [-1] * len(rows)
    elif module in ("embed_tokens", "lm_head"):
        share = -(-arch.vocab_size // degree)
        rows = [row if row < arch.vocab_size else -1 for row in range(rank * share, (rank + 1) * share)]
    return rows, columns


def slots_of(heads: int, kv_heads: int, degree: int) -> list[list[int]]:
    """Each rank's key/value heads: as many query heads as possible read one, as many on every rank."""
    read = [query * kv_heads // heads for query in range(heads)]
    on_ranks = [read[rank * heads // degree : (rank + 1) * heads // degree] for rank in range(degree)]
    queries = heads // degree
    runs = [n for n in range(1, queries + 1) if queries % n == 0]
    longest = max(n for n in runs if all(len({*read[i : i + n]}) == 1 for i in range(0, heads, n)))
    return [own[::longest] for own in on_ranks]


def dims(heads: Sequence[int], head_dim: int) -> list[int]:
    return [head * head_dim + i for head in heads for i in range(head_dim)]


def mlp_features(model: Model, size: int, degree: int, rank: int) -> list[int]:
    if degree == 1:
        return list(range(size))
    unit, share = mlp_unit(model), 0
    while share * degree < size:
        share += unit
    return [i if i < size else -1 for i in range(rank * share, (rank + 1) * share)]


def parts_of(name: str, parts: dict[str, list[int]], starts: dict[str, int]) -> list[int]:
    """Of a whole parameter all parts, of one that is stored apart its own rows."""
    apart = name.split(".")[-2]
    if apart in parts:
        return [row - starts[apart] if row >= 0 else -1 for row in parts[apart]]
    return [row for rows in parts.values() for row in rows]


def kind(name: str) -> str:
    return name.rpartition(".")[2]


# ---------------------------------------------------------------------------------------------------- what is read


def parameters(module: ModuleType, folder: Path, rank: int, degree: int) -> dict[str, Array]:
    """Everything of a rank in full precision, by name."""
    checkpoint = part(module, "checkpoint").open_checkpoint(folder, rank, degree)
    found = {}
    for parameter in checkpoint.parameters:
        array = np.zeros(parameter.shape, np.float32)
        for row, piece in checkpoint.pieces(parameter, "np"):
            rows = array[row : row + len(piece)]
            (rows[:, : piece.shape[1]] if piece.ndim == 2 else rows)[...] = piece
        found[parameter.name] = array
    for matrix in getattr(checkpoint, "matrices", ()):
        found[matrix.name] = dequantized(module, matrix)
    return found


def dequantized(module: ModuleType, matrix: Any) -> Array:
    q = np.zeros(matrix.shape, np.uint8)
    covered = np.zeros(matrix.shape[0], int)
    for row, piece in matrix.pieces():
        assert piece.shape[1] == matrix.shape[1]
        q[row : row + len(piece)] = piece
        covered[row : row + len(piece)] += 1
    assert (covered == 1).all()
    scales = matrix.scales().astype(np.float32)
    if matrix.format["packing"] == "fp8":
        height, width = matrix.format["block"]
        spread = np.repeat(np.repeat(scales, height, axis=0), width, axis=1)[: q.shape[0], : q.shape[1]]
        return q.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * spread
    size = matrix.format["group_size"] or q.shape[1]
    assert scales.shape == (q.shape[0], -(-q.shape[1] // size))
    points = matrix.zeros() if matrix.format["zero_points"] else np.full(scales.shape, 1 << (matrix.format["bits"] - 1))
    spread, zeros = (np.repeat(a, size, axis=1)[:, : q.shape[1]] for a in (scales, points))
    values = (q.astype(np.float32) - zeros) * spread
    if matrix.format["act_order"]:
        ordered = np.empty_like(values)
        ordered[:, matrix.order()] = values
        return ordered
    return values


def assert_share(name: str, found: Array, whole: Array, share: tuple[Sequence[int], Sequence[int]]) -> None:
    rows, columns = (np.array(indices) for indices in share)
    assert found.shape == (len(rows), len(columns))[: found.ndim], name
    want = whole[rows] * (rows >= 0)[:, None] if whole.ndim == 2 else whole[rows] * (rows >= 0)
    if whole.ndim == 2:
        want = want[:, columns] * (columns >= 0)
    has = np.outer(rows >= 0, columns >= 0) if whole.ndim == 2 else rows >= 0
    np.testing.assert_array_equal(found[has], want[has], err_msg=name)
    assert not found[np.broadcast_to((rows < 0)[:, None], found.shape) if found.ndim == 2 else rows < 0].any(), name


def part(module: ModuleType, name: str) -> Any:
    return importlib.import_module(f"{module.__name__}.{name}")
