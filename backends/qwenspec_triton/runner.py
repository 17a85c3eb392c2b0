"""A generated package behind numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwenspec.backend.adapter import PackageRunner
from qwenspec.backend.api import Cache
from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec_triton.taps import Recorder

if TYPE_CHECKING:
    from qwenspec.backend.api import Floats, Ints


class TritonRunner(PackageRunner):
    """Keeps qwenspec.backend.api.Runner."""

    def taps(self, ids: Ints, cache: Cache) -> Mapping[str, Floats]:
        recorder = Recorder(self.module.layers)
        with recorder.attached(self.model):
            logits = self.model.batch_verify(self.model.embed(self._ids(ids)), cache)
        outputs = recorder.outputs | {"logits": logits[0]}
        return {name: self._numpy(output) for name, output in outputs.items()}

    def _load(self, weights: Path, device: str, dtype: str | None) -> Any:
        try:
            return super()._load(weights, device, dtype)
        except self.module.DeviceError as error:
            raise SpecError([Diagnostic("no-device", str(error))]) from error

    def _ids(self, ids: Ints) -> Tensor:
        return torch.as_tensor(ids, device=self.model.device)

    def _embeds(self, embeds: Floats) -> Tensor:
        return torch.as_tensor(embeds, device=self.model.device).to(self.model.dtype)

    def _numpy(self, tensor: Tensor) -> Floats:
        array: Floats = tensor.float().cpu().numpy()
        return array
