"""A generated package behind numpy."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwenspec.backend.api import Cache
from qwenspec.backend.load import import_package
from qwenspec.diagnostics import Diagnostic, SpecError

if TYPE_CHECKING:
    from qwenspec.backend.api import Floats, Ints


class TritonRunner:
    """Keeps qwenspec.backend.api.Runner; `module` and `model` are the package's own, for what numpy cannot say."""

    def __init__(self, package: Path, weights: Path, device: str, dtype: str | None) -> None:
        self.module = import_package(package)
        try:
            self.model: Any = self.module.Model.load(weights, device, dtype)
        except self.module.CheckpointError as error:
            raise SpecError(
                [Diagnostic("checkpoint", str(error), hint="is it the checkpoint of this variant?")]
            ) from error

    def embed(self, ids: Ints) -> Floats:
        return _numpy(self.model.embed(self._ids(ids)))

    def prefill(self, embeds: Floats, cache: Cache) -> Floats:
        return _numpy(self.model.prefill(self._embeds(embeds), cache))

    def decode(self, embeds: Floats, cache: Cache) -> Floats:
        return _numpy(self.model.decode(self._embeds(embeds), cache))

    def batch_prefill(self, embeds: Floats, logit_positions: Ints, cache: Cache) -> Floats:
        return _numpy(self.model.batch_prefill(self._embeds(embeds), self._ids(logit_positions), cache))

    def batch_decode(self, embeds: Floats, cache: Cache) -> Floats:
        return _numpy(self.model.batch_decode(self._embeds(embeds), cache))

    def batch_verify(self, embeds: Floats, cache: Cache) -> Floats:
        return _numpy(self.model.batch_verify(self._embeds(embeds), cache))

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

        Modules that a kernel fuses away (the QK-norms) have none."""
        found: dict[str, Floats] = {}
        hooks = [m.register_forward_hook(_tap(found, name)) for name, m in self.model.named_modules() if name]
        try:
            cache = self.model.create_paged_kv_cache(1, len(ids), len(ids))
            cache.add_sequence(0)
            cache.begin_forward([0], [len(ids)])
            found["logits"] = _numpy(self.model.batch_verify(self.model.embed(self._ids(ids)), cache))[0]
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _ids(self, ids: Ints) -> Tensor:
        return torch.as_tensor(np.asarray(ids), device=self.model.device)

    def _embeds(self, embeds: Floats) -> Tensor:
        return torch.as_tensor(embeds, device=self.model.device).to(self.model.dtype)


def _numpy(tensor: Tensor) -> Floats:
    array: Floats = tensor.float().cpu().numpy()
    return array


def _tap(found: dict[str, Floats], name: str) -> Callable[[Any, Sequence[Any], Any], None]:
    is_layer = re.fullmatch(r"layers\.\d+", name) is not None

    def keep(_module: Any, _inputs: Sequence[Any], output: Any) -> None:
        if is_layer:  # what the MLP adds, and the stream that it is added to
            output = output[0].float() + output[1].float()
        found[name] = _numpy(output[0] if isinstance(output, tuple) else output)

    return keep
