"""What is compared: a spec, its weights, a dtype, and who computes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwenspec.spec.document import Spec
from qwenspec.spec.kv_cache import Fp8KvCache, Int8KvCache
from qwenspec.spec.quantization import Fp8, Fp8Block
from qwenspec.verify.steps import CacheSizes

REFERENCE = "reference"
HUGGING_FACE = "huggingface"
Rounded = Literal["activations", "kv_fp8_e4m3", "kv_int8"]  # activations: to e4m3


def on_ranks(backend: str, ranks: int) -> str:
    """The contender that is a backend's package on so many ranks: `triton@2`; on one, the backend's own name."""
    return f"{backend}@{ranks}" if ranks > 1 else backend


def backend_and_ranks(contender: str) -> tuple[str, int]:
    """What `on_ranks` made the name of; any other is that of a backend."""
    backend, _, ranks = contender.partition("@")
    return (backend, int(ranks)) if ranks.isdecimal() else (contender, 1)


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
    def from_data(cls, data: Mapping[str, Any]) -> Case:
        """What to_data wrote. Raises KeyError, TypeError or ValueError (pydantic's too) for anything else."""
        return cls(
            spec=Spec.model_validate(data["spec"], strict=False),
            seed=data["seed"],
            dtype=data["dtype"],
            sizes=CacheSizes(**data["sizes"]),
            contenders=tuple(data["contenders"]),
            weights=None if data["weights"] is None else Path(data["weights"]),
            device=data["device"],
        )
