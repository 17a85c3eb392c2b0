"""A generated package behind numpy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm.target import Target

from qwenspec.backend.adapter import PackageRunner
from qwenspec.backend.api import Cache
from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec_tvm.taps import Taps

if TYPE_CHECKING:
    from qwenspec.backend.api import Floats, Ints

# LLVM's level of optimisation, for tests, which compile more than they run: at 0 they take half the time.
OPT_LEVEL = "QWENSPEC_LLVM_OPT_LEVEL"


class TvmRunner(PackageRunner):
    """Keeps qwenspec.backend.api.Runner."""

    def __init__(self, package: Path, weights: Path, device: str, dtype: str | None) -> None:
        """Raises SpecError: `checkpoint` for weights that are not this variant's, `build` where none can be built."""
        self._device = device
        super().__init__(package, weights, device, dtype)
        self._taps: Taps | None = None

    def taps(self, ids: Ints, cache: Cache) -> Mapping[str, Floats]:
        """Compiles a second library when first asked for."""
        self._taps = self._taps or Taps(self.module, self._device, self.model.dtype, self.model.ranks.size)
        embeds = self.model.embed(self._ids(ids))
        outputs = self._taps(self.model, embeds, cache)
        return {"embed_tokens": self._numpy(embeds)[0]} | {name: self._numpy(out) for name, out in outputs.items()}

    def _load(self, weights: Path, device: str, dtype: str | None) -> Any:
        if (level := os.environ.get(OPT_LEVEL)) and device == "cpu":
            host = self.module.engine.find_target(device).export()
            self._device = device = str(Target({**host, "opt-level": int(level)}))
        try:
            return super()._load(weights, device, dtype)
        except self.module.BuildError as error:
            raise SpecError([Diagnostic("build", str(error))]) from error

    def _ids(self, ids: Ints) -> Ints:
        return ids

    def _embeds(self, embeds: Floats) -> Floats:
        return embeds

    def _numpy(self, tensor: Any) -> Floats:
        array: Floats = tensor.numpy().astype(np.float32)
        return array
