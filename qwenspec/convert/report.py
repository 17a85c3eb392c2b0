"""What a conversion did: bytes before and after, and the error of each tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qwenspec.convert.rounding import Error
from qwenspec.spec.quantization import Int4, Int8

REPORT = "quantization_report.json"


@dataclass(frozen=True, slots=True)
class TensorError:
    """How much of a tensor [rows, inputs] its format lost."""

    tensor: str
    shape: tuple[int, ...]
    format: str
    error: Error

    def to_data(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "shape": list(self.shape), "format": self.format, **_told(self.error)}


@dataclass(frozen=True, slots=True)
class Report:
    """Of one conversion; `tensors` are those that were rounded, in the order of the forward pass.

    `left_out`: links to files outside the checkpoint, which were not copied."""

    checkpoint: str
    quantization: Int8 | Int4
    bytes_before: int
    bytes_after: int
    tensors: tuple[TensorError, ...]
    left_out: tuple[str, ...] = ()

    @property
    def total(self) -> Error:
        """Of all rounded tensors as if they were one."""
        total = Error()
        for tensor in self.tensors:
            total.join(tensor.error)
        return total

    def worst(self, count: int) -> list[TensorError]:
        """Those with the largest relative error, largest first."""
        return sorted(self.tensors, key=lambda tensor: -tensor.error.relative)[:count]

    def to_data(self) -> dict[str, Any]:
        """quantization_report.json."""
        return {
            "checkpoint": self.checkpoint,
            "quantization": self.quantization.model_dump(mode="json"),
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            **_told(self.total),
            "left_out": list(self.left_out),
            "tensors": [tensor.to_data() for tensor in self.tensors],
        }


def report_text(report: Report) -> str:
    return json.dumps(report.to_data(), indent=2) + "\n"


def _told(error: Error) -> dict[str, float]:
    return {"relative_rms_error": error.relative, "largest_error": error.largest}
