"""What is compared: a spec, its weights, a dtype, and who computes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qwenspec.spec.base import Dtype, Model, PositiveInt
from qwenspec.spec.document import Spec
from qwenspec.spec.kv_cache import Fp8KvCache, Int8KvCache
from qwenspec.spec.quantization import Fp8, Fp8Block
from qwenspec.verify.steps import CacheSizes, check_sizes

REFERENCE = "reference"
HUGGING_FACE = "huggingface"
MOST_CONTENDERS, MOST_RANKS = 9, 32  # of a case, which `--replay` is sent by others
Rounded = Literal["activations", "kv_fp8_e4m3", "kv_int8"]  # activations: to e4m3


def on_ranks(backend: str, ranks: int) -> str:
    """The contender that is a backend's package on so many ranks: `triton@2`; on one, the backend's own name."""
    return f"{backend}@{ranks}" if ranks > 1 else backend


def backend_and_ranks(contender: str) -> tuple[str, int]:
    """What `on_ranks` made the name of; any other is that of a backend."""
    backend, _, ranks = contender.partition("@")
    return (backend, int(ranks)) if ranks.isdecimal() else (contender, 1)


def excess(contenders: Sequence[str]) -> str:
    """Why these are more than one machine is asked to run; empty when they are not."""
    ranks = sum(backend_and_ranks(name)[1] for name in contenders)
    if len(contenders) <= MOST_CONTENDERS and ranks <= MOST_RANKS:
        return ""
    most = f"no more than {MOST_CONTENDERS} contenders, and {MOST_RANKS} ranks in all, are run"
    return f"{most}: these are {len(contenders)}, and {ranks} ranks"


@dataclass(frozen=True)
class Case:
    """One spec with weights, and its contenders, of whom the reference is the first.

    `weights`: a checkpoint folder; without one they are random, from `seed`. `dtype` is that of the packages."""

    spec: Spec
    seed: int
    dtype: str
    sizes: CacheSizes
    contenders: tuple[str, ...]
    weights: Path | None = None
    device: str = "cpu"

    @property
    def packages(self) -> tuple[str, ...]:
        """The contenders that are generated packages: they have a cache of pages."""
        return tuple(name for name in self.contenders if name not in (REFERENCE, HUGGING_FACE))

    @property
    def head_dtype(self) -> str | None:
        """That of the LM head, where the spec gives it one of its own."""
        arch = self.spec.architecture
        own = None if arch.lm_head is None else arch.lm_head.dtype
        return own if own != arch.dtype else None

    @property
    def rounded(self) -> tuple[Rounded, ...]:
        """What the spec itself rounds so coarsely that a difference in the last bit may become a large one."""
        quantization = self.spec.quantization
        rounds = isinstance(quantization, Fp8Block | Fp8) and quantization.activations != "none"
        found: tuple[Rounded, ...] = ("activations",) if rounds else ()
        match self.spec.kv_cache:
            case None:
                return found
            case Fp8KvCache():
                return (*found, "kv_fp8_e4m3")
            case Int8KvCache():
                return (*found, "kv_int8")

    def to_data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "spec": self.spec.model_dump(mode="json", by_alias=True),
            "seed": self.seed,
            "dtype": self.dtype,
            "sizes": dataclasses.asdict(self.sizes),
            "contenders": list(self.contenders),
            "weights": None if self.weights is None else str(self.weights),
            "device": self.device,
        }

    @classmethod
    def from_data(cls, data: object) -> Case:
        """What to_data wrote. Raises ValueError (pydantic's too) for anything else, and for what is larger than
        anybody verifies."""
        stored = _Stored.model_validate(data)
        # Lists are tuples in JSON, and nothing else is what it is not.
        spec = Spec.model_validate_json(json.dumps(stored.spec))
        if told := sorted({"file", "options"} & stored.spec.keys()):
            raise ValueError(f"`{told[0]}` says where a spec came from, and is not in one")
        sizes = CacheSizes(**stored.sizes.model_dump())
        weights = None if stored.weights is None else Path(stored.weights)
        return cls(spec, stored.seed, stored.dtype, sizes, tuple(stored.contenders), weights, stored.device)


class _Sizes(Model):
    page_size: PositiveInt
    pages: PositiveInt
    max_batch_size: PositiveInt
    chunk: PositiveInt
    evicts: bool

    @model_validator(mode="after")
    def _are_not_large(self) -> _Sizes:
        check_sizes(CacheSizes(**self.model_dump()))
        return self


class _Stored(Model):
    """A case in JSON."""

    spec: dict[str, Any]
    seed: int = Field(ge=0, lt=1 << 32)
    dtype: Dtype
    sizes: _Sizes
    contenders: list[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}(@[1-9][0-9]{0,5})?$")]]
    weights: str | None
    device: str = Field(pattern=r"^[a-z]+(:[0-9]{1,3})?$")

    @field_validator("contenders")
    @classmethod
    def _begin_with_the_reference(cls, names: list[str]) -> list[str]:
        if len(names) < 2 or names[0] != REFERENCE or len({*names}) < len(names):
            raise ValueError("the contenders are not the reference and others")
        if reason := excess(names):
            raise ValueError(reason)
        return names
