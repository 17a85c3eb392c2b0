"""The safetensors files of a checkpoint folder: which they are, what they hold, and what a model asks of them."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FLOATS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}  # dtypes that parameters are read from, and their bytes
# Bits of a number, by all dtypes that safetensors has.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
PIECE = 8 << 20  # bytes read at once
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
SHOWN = 20  # lines of one message
# Prefixes that wrappers of a model give to all of its names, and the way out.
WRAPPERS = {
    "base_model.model.": "save what peft's merge_and_unload returns",
    "_orig_mod.": "torch.compile wrapped the model; save its `_orig_mod`",
    "module.": "DataParallel wrapped the model; save its `module`",
}


class CheckpointError(ValueError):
    """The checkpoint does not fit the model; the message says why."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that a checkpoint must hold, or may if it is optional."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint file: its name there, and where in the file its bytes begin and end."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Files:
    """The files of a folder that are the checkpoint.

    indexed: tensor -> file by the index, empty where none was asked
    notes: what else lies there and is not read"""

    files: tuple[Path, ...]
    indexed: dict[str, Path]
    notes: tuple[str, ...]


# ------------------------------------------------------------------------------------------------ text and JSON


def read_text(file: Path) -> str:
    """The text of a regular file, which is UTF-8 wherever it is read. Raises CheckpointError, which names the file."""
    try:
        if not file.is_file():  # a fifo would never end
            raise CheckpointError(f"{file} is {'no regular file' if file.exists() else 'missing'}")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, which names the file."""
    text = read_text(file)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}:{error.lineno}:{error.colno} is not valid JSON: {error.msg}") from error
    except RecursionError:
        raise CheckpointError(f"{file} is nested too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return content


def read_optional_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file. Raises CheckpointError, which names the file."""
    return read_json(file) if file.exists() else {}


# -------------------------------------------------------------------------------------- which files it is


def choose_files(folder: Path) -> Files:
    """As transformers decides: model.safetensors, else what the index names. Without either, the only set there is.

    Raises CheckpointError where that leaves no set of safetensors files, or several."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    present = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    indexed: dict[str, str] = {}
    if SINGLE in present:
        chosen, what = [SINGLE], SINGLE
    elif INDEX in names:
        indexed = _read_index(folder / INDEX)
        chosen, what = sorted(set(indexed.values())), INDEX
    else:
        chosen = _only_set(folder, names, [name for name in present if name != ADAPTER])
        what = _few(chosen)
    notes = list(_notes(what, names, [name for name in present if name not in chosen]))
    return Files(
        tuple(folder / name for name in chosen),
        {tensor: folder / name for tensor, name in indexed.items()},
        tuple(notes),
    )


def _read_index(index: Path) -> dict[str, str]:
    """Tensor -> file by an index, which may name files beside it or below, and no others."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no `weight_map` from tensors to files")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not 0 < len(name) < 256 or not name.isprintable():
            raise CheckpointError(f"{index}: `weight_map` gives {shown(tensor)} no name of a file")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{index} names {name}, and only files in its own folder are read")
    return weight_map


def _only_set(folder: Path, names: Sequence[str], weights: list[str]) -> list[str]:
    """Of files that nothing says more about: a single one, or shards that are numbered from 1 to the last."""
    if not weights:
        raise CheckpointError(f"{folder} has no *.safetensors file: {_held_instead(names)}")
    shards = [re.fullmatch(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors", name) for name in weights]
    if shards == [None]:
        return weights
    numbered = [shard for shard in shards if shard]
    if len(numbered) < len(weights) or len({shard.group(1, 3) for shard in numbered}) > 1:
        raise CheckpointError(
            f"{folder} has several sets of weights ({_few(weights)}), and neither {SINGLE} nor {INDEX} says which is "
            "the checkpoint: give the one its name, or move the others away"
        )
    numbers, count = {int(shard[2]) for shard in numbered}, int(numbered[0][3])
    if absent := next((number for number in range(1, count + 1) if number not in numbers), None):
        raise CheckpointError(f"{folder} has neither {INDEX} nor shard {absent} of {count}")
    return weights


def _held_instead(names: Sequence[str]) -> str:
    """What a folder without safetensors files has in their place, and the way out."""
    if ADAPTER in names or ADAPTER_CONFIG in names:
        return "it is an adapter, without its base model; merge the two (peft's merge_and_unload) and save the result"
    if pickle := next((name for name in names if re.search(r"\.(bin|pt|pth|ckpt)$", name)), None):
        way = "load it with transformers, whose save_pretrained writes safetensors"
        return f"{pickle} is a pickle, which may run code and is never opened; {way}"
    if gguf := next((name for name in names if name.endswith(".gguf")), None):
        return f"{gguf} is GGUF, which is not read; take the checkpoint that it was made from"
    return "the weights of a Hugging Face checkpoint folder are in such files"


def _notes(what: str, names: Sequence[str], left: Sequence[str]) -> Iterator[str]:
    """What a person should know of the choice. what: the file that decided it; left: safetensors that are not read."""
    if what not in (SINGLE, INDEX):
        yield f"The checkpoint is taken to be {what}; transformers looks for {SINGLE} or {INDEX}."
    elif left:
        verb = "is" if len(left) == 1 else "are"
        yield f"{_few(left)} {verb} not read: the checkpoint is {what}, as for transformers."
    if what == SINGLE and INDEX in names:
        yield f"{INDEX} is not read: {SINGLE} comes first, as for transformers."
    if ADAPTER_CONFIG in names:
        yield f"The adapter of {ADAPTER_CONFIG} is not applied; transformers applies it where peft is installed."


def _few(words: Sequence[str]) -> str:
    """Some of them, in a sentence."""
    some = [shown(word) for word in (words[:3] if len(words) > 4 else words)]
    some += [f"{len(words) - 3:,} more"] if len(words) > 4 else []
    return " and ".join([", ".join(some[:-1]), some[-1]] if len(some) > 1 else some)


# ------------------------------------------------------------------------------------------ what they hold


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """Tensor name -> where it is, over all files."""
    stored: dict[str, Stored] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in stored:
                both = f"{stored[name].file} and {file.name}"
                raise CheckpointError(f"{shown(name)} is in two files, {both}: which one is meant cannot be told")
            stored[name] = tensor
    return stored


def either_name(stored: Mapping[str, Stored], tied: Sequence[str]) -> dict[str, Stored]:
    """tied: two names of one tensor. Where the checkpoint has the second alone, it is found under the first."""
    found = dict(stored)
    if tied and tied[0] not in found and tied[1] in found:
        found[tied[0]] = found.pop(tied[1])
    return found


def read_header(file: Path) -> dict[str, Stored]:
    """A safetensors file's tensors: 8 bytes of length, that much JSON, then the data, all of which is some tensor's.

    Raises CheckpointError, which names the file, for whatever else it is."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a fifo would never open
            raise CheckpointError(f"{file} is no regular file")
        with file.open("rb") as opened:
            prefix = opened.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise CheckpointError(f"{file} is a pointer of git-lfs: `git lfs pull` brings the file itself")
            if len(prefix) < 8 or length > MAX_HEADER or 8 + length > status.st_size:
                raise CheckpointError(f"{file} cannot be read: it is no safetensors file, or cut off in its header")
            text = opened.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_number)
        if not isinstance(entries, dict):
            raise ValueError("there is no object")
        tensors = [_read_entry(file, name, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: in its header, {error}") from None
    _check_spans(file, [tensor for tensor in tensors if tensor], 8 + length, status.st_size)
    return {tensor.name: tensor for tensor in tensors if tensor}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _read_entry(file: Path, name: str, entry: Any, begin: int) -> Stored | None:
    """One tensor of a header, None for the header's own metadata. Raises ValueError."""
    name.encode()  # raises for half of a surrogate pair
    if name == "__metadata__":
        if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
            raise ValueError("the metadata are not texts")
        return None
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]}:
            if dtype not in BITS:
                raise ValueError(f"{shown(name)} has the unknown dtype {shown(dtype)}")
            if len(shape) > 16 or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end)):
                raise ValueError(f"{shown(name)} has sizes or offsets that are none")
            if start > end or math.prod(shape) * BITS[dtype] != 8 * (end - start):
                raise ValueError(f"{shown(name)} is {dtype} {shape}, and has {end - start} bytes")
            return Stored(file, name, dtype, tuple(shape), begin + start, begin + end)
    raise ValueError(f"{shown(name)} has not `dtype`, `shape` and `data_offsets`")


def _check_spans(file: Path, tensors: list[Stored], begin: int, size: int) -> None:
    """Tensors lie one behind the other, from the header's end to the file's."""
    position = begin
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != position:
            what = "overlaps another tensor" if tensor.start < position else "leaves a gap before it"
            raise CheckpointError(f"{file} cannot be read: {shown(tensor.name)} {what}")
        position = tensor.end
    if position > size:
        raise CheckpointError(f"{file} cannot be read: it ends before its tensors do. Was it downloaded to the end?")
    if position < size:
        raise CheckpointError(f"{file} cannot be read: {size - position} bytes of it are no tensor's")


# ------------------------------------------------------------------------------------- what a model asks for


def check(wanted: Sequence[tuple[str, Tensor]], stored: dict[str, Stored], allowed: Sequence[str]) -> list[str]:
    """Every reason why the checkpoint does not fit: missing, mis-shaped, of another dtype, or left over.

    wanted: parameters' names with tensors that they need
    allowed: patterns of tensors that nothing needs to read"""
    problems = []
    for parameter, tensor in wanted:
        found = stored.get(tensor.name)
        if found is None:
            if not tensor.optional:
                problems.append(f"missing: {tensor.name} {list(tensor.shape)}, for {parameter}")
        elif (found.shape or (1,)) != tensor.shape:  # a scale may be [] or [1]
            needed = f"{parameter} needs {list(tensor.shape)}"
            problems.append(f"shape: {tensor.name} is {list(found.shape)}, and {needed}")
        elif found.dtype not in tensor.dtypes:
            needed = f"{parameter} needs one of {', '.join(tensor.dtypes)}"
            problems.append(f"dtype: {tensor.name} is {found.dtype}, and {needed}")
    for name in sorted(set(stored) - {tensor.name for _, tensor in wanted}):
        if not any(fnmatch(name, pattern) for pattern in allowed):
            problems.append(f"left over: {shown(name)} {list(stored[name].shape)} is read by no parameter")
    return problems


def shown(name: str) -> str:
    """A name from a file, in a message: of one line, and not endless."""
    name = name if len(name) <= 200 else f"{name[:200]}…"
    return name if name.isprintable() else ascii(name)


def explained(problems: Sequence[str], stored: dict[str, Stored]) -> list[str]:
    """Problems in lines for people: where they are many, some of them and what the checkpoint does hold."""
    if told := wrapper(stored):
        return [told]
    if len(problems) <= SHOWN:
        return list(problems)
    more = f"and {len(problems) - SHOWN} more"
    return [*problems[:SHOWN], more, "it holds:", *(f"  {line}" for line in summary(stored))]


def summary(stored: dict[str, Stored]) -> list[str]:
    """What a checkpoint holds, in a line for each kind of tensor: `{i}` is any number, as a rule a layer's."""
    kinds = Counter(
        f"{shown(re.sub(r'(?<=[.])[0-9]+(?=[.])', '{i}', name))} {tensor.dtype} {list(tensor.shape)}"
        for name, tensor in sorted(stored.items())
    )
    lines = [f"{kind}, {count} times" if count > 1 else kind for kind, count in kinds.items()]
    return lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more kinds"] if len(lines) > SHOWN else [])


def wrapper(names: Collection[str]) -> str | None:
    """What explains that all names begin with a wrapper's prefix, and the way out."""
    for prefix, way in WRAPPERS.items():
        if names and all(name.startswith(prefix) for name in names):
            return f"every tensor's name begins with `{prefix}`: {way}"
    return None
