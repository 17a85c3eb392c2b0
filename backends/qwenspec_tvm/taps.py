"""A generated decoder whose modules give their outputs away."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from tvm import relax
from tvm.relax.frontend import nn


class Taps:
    """`batch_verify`, compiled once more so that it returns every module's output too."""

    def __init__(self, package: ModuleType, device: str, dtype: str) -> None:
        """In memory, for the target that Model.load takes by this name."""
        compiler = importlib.import_module(f"{package.__name__}.compiler")
        targets = importlib.import_module(f"{package.__name__}.targets")
        target = targets.find_target(device)
        outputs: dict[str, nn.Tensor] = {}
        with target, compiler.quick_frames():
            decoder = compiler.Decoder(package.Config(), dtype)
            for name, module in list(_named_modules(decoder)):
                module.forward = _keeping(outputs, name, module.forward)
            exported, _ = decoder.export_tvm(spec=_spec(decoder, outputs))
        executable = compiler.compile_module(exported, target, {})
        self._run: Any = relax.VirtualMachine(executable, targets.find_device(device))["taps"]
        self._names = ("logits", *outputs)

    def __call__(self, model: Any, embeds: Any, cache: Any) -> Mapping[str, Any]:
        """embeds [1, n, hidden] of a forward that is open -> float32 tensors by address, without the 1 in front."""
        others = [cache.inv_freq] if hasattr(cache, "inv_freq") else []
        found = self._run(embeds, cache.state, *others, model._parameters)
        return dict(zip(self._names, found, strict=True))


def _named_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    children = enumerate(module) if isinstance(module, nn.ModuleList) else vars(module).items()
    for name, child in children:
        if isinstance(child, nn.Module):
            if not isinstance(child, nn.ModuleList):
                yield f"{prefix}{name}", child
            yield from _named_modules(child, f"{prefix}{name}.")


def _keeping(outputs: dict[str, nn.Tensor], name: str, forward: Any) -> Any:
    is_layer = re.fullmatch(r"layers\.\d+", name) is not None

    def keeping(*inputs: Any) -> Any:
        output = forward(*inputs)
        if is_layer:  # what the MLP adds, and the stream that it is added to
            kept = output[0].astype("float32") + output[1].astype("float32")
        else:
            kept = output[0] if isinstance(output, tuple) else output
        outputs[name] = kept.astype("float32")
        return output

    return keeping


def _spec(decoder: Any, outputs: dict[str, nn.Tensor]) -> nn.spec.ModuleSpec:
    spec = decoder.get_default_spec()
    verify = spec.method_specs[spec.method_names.index("batch_verify")]

    def taps(*inputs: Any) -> tuple[nn.Tensor, ...]:
        logits, _ = decoder.batch_verify(*inputs)
        return nn.op.squeeze(logits, 0), *outputs.values()

    method = nn.spec.MethodSpec(taps, verify.arg_names, verify.arg_specs, verify.param_mode, verify.effect_mode)
    return nn.spec.ModuleSpec(decoder, ["taps"], [method])
