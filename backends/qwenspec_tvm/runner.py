"""A generated package behind numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwenspec.backend.api import Cache
from qwenspec.backend.load import import_package
from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec_tvm.taps import Taps

if TYPE_CHECKING:
    from qwenspec.backend.api import Floats, Ints


class TvmRunner:
    """Keeps qwenspec.backend.api.Runner; `module` and `model` are the package's own, for what numpy cannot say."""

    def __init__(self, package: Path, weights: Path, device: str, dtype: str | None) -> None:
        self.module = import_package(package)
        self._device = device
        self._taps: Taps | None = None
        try:
            self.model: Any = self.module.Model.load(weights, device, dtype)
        except self.module.CheckpointError as error:
            raise SpecError(
                [Diagnostic("checkpoint", str(error), hint="is it the checkpoint of this variant?")]
            ) from error
        except self.module.BuildError as error:
            raise SpecError([Diagnostic("build", str(error))]) from error

    def embed(self, ids: Ints) -> Floats:
        return _numpy(self.model.embed(_ids(ids)))

    def prefill(self, embeds: Floats, cache: Cache) -> Floats:
        return _numpy(self.model.prefill(embeds, cache))

    def decode(self, embeds: Floats, cache: Cache) -> Floats:
        return _numpy(self.model.decode(embeds, cache))

    def batch_prefill(self, embeds: Floats, logit_positions: Ints, cache: Cache) -> Floats:
        return _numpy(self.model.batch_prefill(embeds, _ids(logit_positions), cache))

    def batch_decode(self, embeds: Floats, cache: Cache) -> Floats:
        return _numpy(self.model.batch_decode(embeds, cache))

    def batch_verify(self, embeds: Floats, cache: Cache) -> Floats:
        return _numpy(self.model.batch_verify(embeds, cache))

    def create_paged_kv_cache(
        self,
        max_batch_size: int,
        max_total_seq_len: int,
        prefill_chunk_size: int,
        page_size: int = 16,
        support_sliding_window: bool = False,
    ) -> Cache:
        cache: Cache = self.model.create_paged_kv_cache(
            max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, support_sliding_window
        )
        return cache

    def taps(self, ids: Ints) -> Mapping[str, Floats]:
        """Outputs of the package's modules, of a layer the residual stream after it.

        Modules that a kernel fuses away (the QK-norms) have none. Compiled when first asked for."""
        self._taps = self._taps or Taps(self.module, self._device, self.model.dtype)
        cache = self.model.create_paged_kv_cache(1, len(ids), len(ids))
        cache.add_sequence(0)
        cache.begin_forward([0], [len(ids)])
        embeds = self.model.embed(_ids(ids))
        outputs = self._taps(self.model, embeds, cache)
        return {"embed_tokens": _numpy(embeds)[0]} | {name: _numpy(output) for name, output in outputs.items()}


def _ids(ids: Ints) -> Ints:
    return np.ascontiguousarray(ids, dtype=np.int32)


def _numpy(tensor: Any) -> Floats:
    found: Floats = tensor.numpy().astype(np.float32)
    return found
