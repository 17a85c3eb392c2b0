"""A generated decoder whose modules give their outputs away, and the kernels inside of its attention theirs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tvm import relax, te
from tvm.relax.frontend import nn

from qwenspec.backend.adapter import is_layer, replaced


class Taps:
    """`batch_verify`, compiled once more so that it returns every module's output too."""

    def __init__(self, package: ModuleType, device: str, dtype: str, degree: int = 1) -> None:
        """In memory, for the target that Model.load takes by this name. Of several ranks, each has its own outputs."""
        compiler, layers, targets = (
            importlib.import_module(f"{package.__name__}.{name}") for name in ("compiler", "layers", "targets")
        )
        target = targets.find_target(device)
        recorder = _Recorder(layers, importlib.import_module(f"{package.__name__}.kernels.attention"))
        with target, compiler.quick_frames():
            decoder = compiler.Decoder(package.Config(), dtype, degree)
            with recorder.attached(decoder):
                exported, _ = decoder.export_tvm(spec=_spec(decoder, recorder.outputs))
        executable = compiler.compile_module(exported, target, {})
        self._run: Any = relax.VirtualMachine(executable, targets.find_device(device))["taps"]
        self._names = (*recorder.outputs, "logits")

    def __call__(self, model: Any, embeds: Any, cache: Any) -> dict[str, Any]:
        """embeds [1, n, hidden] of a forward that is open -> tensors [n, …] by address, in the order of execution."""
        cache.check_open(embeds.shape[1])
        others = [cache.inv_freq] if hasattr(cache, "inv_freq") else []
        found = self._run(embeds, cache.state, *others, model._parameters)
        return dict(zip(self._names, found, strict=True))


class _Recorder:
    """Keeps outputs by address, float32, in the order in which a decoder's modules are traced."""

    def __init__(self, layers: ModuleType, kernels: ModuleType) -> None:
        """The package's modules `layers` and `kernels.attention`."""
        self.outputs: dict[str, nn.Tensor] = {}
        self._layers, self._kernels = layers, kernels
        self._attention = ""  # the address of the attention that is traced

    @contextmanager
    def attached(self, decoder: nn.Module) -> Iterator[None]:
        """While it lasts, the decoder's modules are recorded when they are traced. For a decoder that has no later."""
        for name, module in _named_modules(decoder):
            if name != "lm_head" and hasattr(module, "forward"):  # the head's output is the logits
                module.forward = self._forwarding(name, module)
        layers = self._layers
        with replaced(layers, rotate=self._rotating(layers.rotate), attend=self._attending(layers.attend)):
            yield

    def _keep(self, address: str, output: nn.Tensor) -> None:
        self.outputs[address] = output.astype("float32")

    def _forwarding(self, name: str, module: nn.Module) -> Callable[..., Any]:
        forward, is_attention = module.forward, isinstance(module, self._layers.Attention)

        def recorded(*inputs: Any) -> Any:
            if is_attention:
                self._attention = name
            output = forward(*inputs)
            if is_layer(name):  # what the MLP adds, and the stream that it is added to
                self._keep(name, output[0].astype("float32") + output[1].astype("float32"))
            else:
                self._keep(name, output[0] if isinstance(output, tuple) else output)
            return output

        return recorded

    def _rotating(self, rotate: Callable[..., nn.Tensor]) -> Callable[..., nn.Tensor]:
        parameters = inspect.signature(rotate)

        def recorded(*arguments: Any) -> nn.Tensor:
            call = parameters.bind(*arguments).arguments
            if "q_norm_weight" in call:
                self._keep_heads(rotate(**call | _no_rotation(call)), call, "q_norm", "k_norm")
            qkv = rotate(**call)
            self._keep_heads(qkv, call, "q", "k")
            return qkv

        return recorded

    def _keep_heads(self, qkv: nn.Tensor, call: dict[str, Any], *names: str) -> None:
        heads, kv_heads = call["num_heads"], call["num_kv_heads"]
        parts = nn.op.split(qkv, [heads, heads + kv_heads], axis=1)
        for name, part in zip(names, parts, strict=False):  # and not the values
            self._keep(f"{self._attention}.{name}", part)

    def _attending(self, attend: Callable[..., nn.Tensor]) -> Callable[..., nn.Tensor]:
        parameters = inspect.signature(attend)

        def recorded(*arguments: Any) -> nn.Tensor:
            if hasattr(self._kernels, "to_entries"):  # keys are quantised: in place of what they were before
                self._keep(f"{self._attention}.k", self._cached_keys(parameters.bind(*arguments).arguments))
            context = attend(*arguments)
            self._keep(f"{self._attention}.context", context)
            return context

        return recorded

    def _cached_keys(self, call: dict[str, Any]) -> nn.Tensor:
        """[n, num_kv_heads, head_dim] float32, of attend's arguments by name."""
        qkv, num_heads = call["qkv"], call["num_heads"]
        scales = [call[name] for name in ("k_scale", "v_scale") if name in call]
        entries = self._kernels.to_entries(qkv, num_heads, *scales)
        kv_heads, head_dim = (int(qkv.shape[1]) - num_heads) // 2, int(qkv.shape[2])
        first = int(entries.shape[1]) - 2 * kv_heads
        part = importlib.import_module(self._kernels.__name__.replace("attention", "kv_entries"))

        def keys(entries: te.Tensor, *k_scale: te.Tensor) -> te.Tensor:
            def key(token: Any, head: Any, i: Any) -> Any:
                row = token, first + head
                scale = part.attention_scale(*k_scale) if k_scale else part.entry_scale(entries, row, head_dim)
                return part.entry_value(entries, row, i) * scale

            return te.compute((qkv.shape[0], kv_heads, head_dim), key, "keys")

        return nn.op.tensor_expr_op(keys, "cached_keys", [entries, *scales[:1]])


def _no_rotation(call: dict[str, Any]) -> dict[str, nn.Tensor]:
    """Arguments that turn nothing and scale nothing, so that what is left is the norm, rounded as it always is."""
    cos = call["cos"]
    found = {"cos": nn.op.ones(cos.shape, cos.dtype), "sin": nn.op.zeros(cos.shape, cos.dtype)}
    if "query_scale" in call:
        found["query_scale"] = nn.op.ones(call["query_scale"].shape, "float32")
    return found


def _named_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    children = enumerate(module) if isinstance(module, nn.ModuleList) else list(vars(module).items())
    for name, child in children:
        if isinstance(child, nn.Module):
            if not isinstance(child, nn.ModuleList):
                yield f"{prefix}{name}", child
            yield from _named_modules(child, f"{prefix}{name}.")


def _spec(decoder: Any, outputs: dict[str, nn.Tensor]) -> nn.spec.ModuleSpec:
    spec = decoder.get_default_spec()
    verify = spec.method_specs[spec.method_names.index("batch_verify")]

    def taps(*inputs: Any) -> tuple[nn.Tensor, ...]:
        logits, _ = decoder.batch_verify(*inputs)
        return *outputs.values(), nn.op.squeeze(logits, 0)

    method = nn.spec.MethodSpec(taps, verify.arg_names, verify.arg_specs, verify.param_mode, verify.effect_mode)
    return nn.spec.ModuleSpec(decoder, ["taps"], [method])
