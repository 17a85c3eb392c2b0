"""What backends whose packages have a `Model` and a paged cache share: all but the tensor library.

`PackageBackend` keeps `qwenspec.backend.api.Backend`, `PackageRunner` keeps `Runner`; a backend fills in the rest.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qwenspec.backend.api import Cache, Runner
from qwenspec.backend.fitting import way_out
from qwenspec.backend.load import import_package
from qwenspec.backend.registry import MANIFEST
from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec.ir.nodes import Model

if TYPE_CHECKING:
    from qwenspec.backend.api import Floats, Ints


class PackageBackend(ABC):
    """A backend that runs its packages with modules that may be missing."""

    name: str
    libraries: tuple[str, ...]  # distributions that its packages import at run time
    modules: tuple[str, ...]  # without which they cannot be imported

    def unsupported(self, model: Model) -> list[Diagnostic]:
        return []

    def unavailable(self) -> Diagnostic | None:
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            return Diagnostic(
                "backend-missing",
                f"the {self.name} backend cannot run here: {', '.join(missing)} not installed",
                hint=f"pip install 'qwenspec[{self.name}]'",
            )
        for name in self.modules:
            try:
                importlib.import_module(name)
            except Exception as error:  # TVM's, for one, raises RuntimeError where a user has no home
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                return Diagnostic(
                    "backend-missing",
                    f"the {self.name} backend cannot run here: `import {name}` fails: {reason}",
                    hint=f'see `python -c "import {name}"`',
                )
        return None

    @abstractmethod
    def emit(self, model: Model) -> dict[str, str]: ...

    @abstractmethod
    def devices(self) -> Sequence[str]: ...

    @abstractmethod
    def open(self, package: Path, weights: Path, device: str = "cpu", dtype: str | None = None) -> Runner: ...


class PackageRunner(ABC):
    """A package's own methods, with numpy arrays converted on the way in and out.

    `module` is the imported package and `model` its Model with weights, for what numpy cannot say."""

    def __init__(self, package: Path, weights: Path, device: str, dtype: str | None) -> None:
        """Raises SpecError: `checkpoint` for weights that are not this variant's, `ranks` where the processes that
        share the model cannot work together, and what `_load` raises."""
        self.module = import_package(package)
        try:
            self.model = self._load(weights, device, dtype)
        except self.module.CheckpointError as error:
            raise _not_loaded(package, weights, str(error)) from error
        except self.module.RankError as error:
            raise SpecError([Diagnostic("ranks", str(error))]) from error

    def embed(self, ids: Ints) -> Floats:
        return self._numpy(self.model.embed(self._ids(numbers("ids", ids))))

    def prefill(self, embeds: Floats, cache: Cache) -> Floats:
        return self._numpy(self.model.prefill(self._embeds(numbers("embeds", embeds)), cache))

    def decode(self, embeds: Floats, cache: Cache) -> Floats:
        return self._numpy(self.model.decode(self._embeds(numbers("embeds", embeds)), cache))

    def batch_prefill(self, embeds: Floats, logit_positions: Ints, cache: Cache) -> Floats:
        given = self._embeds(numbers("embeds", embeds))
        return self._numpy(
            self.model.batch_prefill(given, self._ids(numbers("logit_positions", logit_positions)), cache)
        )

    def batch_decode(self, embeds: Floats, cache: Cache) -> Floats:
        return self._numpy(self.model.batch_decode(self._embeds(numbers("embeds", embeds)), cache))

    def batch_verify(self, embeds: Floats, cache: Cache) -> Floats:
        return self._numpy(self.model.batch_verify(self._embeds(numbers("embeds", embeds)), cache))

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

    @abstractmethod
    def taps(self, ids: Ints, cache: Cache) -> Mapping[str, Floats]: ...

    def _load(self, weights: Path, device: str, dtype: str | None) -> Any:
        return self.module.Model.load(weights, device, dtype)

    @abstractmethod
    def _ids(self, ids: Ints) -> Any:
        """Integers as the package's methods take them."""

    @abstractmethod
    def _embeds(self, embeds: Floats) -> Any:
        """Embeddings as the package's methods take them."""

    @abstractmethod
    def _numpy(self, tensor: Any) -> Floats:
        """A tensor of the package's, of any floating dtype."""


def numbers(name: str, values: Any) -> Any:
    """An array of a dtype that every backend's tensors can have."""
    import numpy as np

    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} are numbers, and not {array.dtype}")
    return array


def _not_loaded(package: Path, weights: Path, said: str) -> SpecError:
    """Why a package did not load a checkpoint; where that is of another variant, which one."""
    message, *details = said.splitlines()
    hint = ""
    if details:
        # Of a package that was carried elsewhere the spec may not be there: then no variant is found.
        manifest = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
        hint = way_out(manifest["spec"], weights)
    return SpecError([Diagnostic("checkpoint", message, hint=hint, details=tuple(details))])


def is_layer(address: str) -> bool:
    """Whether a module's address is a whole decoder layer's: its output is two summands of the residual stream."""
    return re.fullmatch(r"layers\.\d+", address) is not None


@contextmanager
def replaced(module: ModuleType, **functions: Any) -> Iterator[None]:
    """A module's functions by others for a while: what the module's own code then calls."""
    originals = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(originals)
