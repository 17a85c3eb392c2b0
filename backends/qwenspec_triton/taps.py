"""What the modules of a package give while a forward runs, and the kernels inside of its attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qwenspec.backend.adapter import is_layer, replaced


class Recorder:
    """Keeps outputs by address, float32, in the order of execution."""

    def __init__(self, layers: ModuleType) -> None:
        """`layers` is the package's module of that name."""
        self.outputs: dict[str, Tensor] = {}
        self._layers = layers
        self._attention = ""  # the address of the attention that runs

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """While it lasts, every forward of the model is recorded."""
        layers = self._layers
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if isinstance(module, layers.Attention):
                    stack.enter_context(module.register_forward_pre_hook(self._entering(name)))
                # The head's output is the logits, and fused parts are told together.
                if name not in ("", "lm_head") and not self._is_part(model, name):
                    stack.enter_context(module.register_forward_hook(self._leaving(name)))
            rotate = self._rotating(layers.rotate_and_cache)
            decode, prefill = (self._attending(f) for f in (layers.decode_attention, layers.prefill_attention))
            stack.enter_context(
                replaced(layers, rotate_and_cache=rotate, decode_attention=decode, prefill_attention=prefill)
            )
            yield

    def _is_part(self, model: nn.Module, name: str) -> bool:
        fused = getattr(self._layers, "LinearBlocks", ())  # not every package has it
        return isinstance(model.get_submodule(name.rpartition(".")[0]), fused)

    def _keep(self, address: str, output: Tensor) -> None:
        # A copy: kernels may write over what they have read.
        self.outputs[address] = output.to(torch.float32, copy=True)

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_module: nn.Module, _inputs: Any) -> None:
            self._attention = name

        return enter

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if is_layer(name):  # what the MLP adds, and the stream that it is added to
                output = output[0].float() + output[1].float()
            self._keep(name, output[0] if isinstance(output, tuple) else output)

        return leave

    def _rotating(self, rotate_and_cache: Callable[..., Tensor]) -> Callable[..., Tensor]:
        parameters = inspect.signature(rotate_and_cache)

        def rotate(*arguments: Any) -> Tensor:
            call = parameters.bind(*arguments).arguments
            if "q_norm_weight" in call:
                q_norm, k_norm = _norms(rotate_and_cache, call)
                self._keep(f"{self._attention}.q_norm", q_norm)
                self._keep(f"{self._attention}.k_norm", k_norm)
            q = rotate_and_cache(**call)
            self._keep(f"{self._attention}.q", q)
            self._keep(f"{self._attention}.k", _cached_keys(call))
            return q

        return rotate

    def _attending(self, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(*arguments: Any) -> Tensor:
            context = attention(*arguments)
            self._keep(f"{self._attention}.context", context)
            return context

        return attend


def _cached_keys(call: dict[str, Any]) -> Tensor:
    """What attention reads of the keys that rotate_and_cache has just cached: [n, num_kv_heads, head_dim]."""
    keys: Tensor = call["k_pages"].flatten(0, 1)[call["slots"]]
    if "k_scales" not in call:
        return keys
    scales: Tensor = call["k_scales"]
    if scales.ndim > 1:  # of every token and head
        scales = scales.flatten(0, 1)[call["slots"]].unsqueeze(-1)
    return (keys.view(torch.float8_e4m3fn) if keys.dtype == torch.uint8 else keys).float() * scales


def _norms(rotate_and_cache: Callable[..., Tensor], call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same kernel on the same heads with nothing to turn or scale, which leaves the norms, rounded as ever.

    -> queries [n, num_heads, head_dim], keys [n, num_kv_heads, head_dim]"""
    n, (_, _, kv_heads, head_dim) = len(call["qkv"]), call["k_pages"].shape
    still = {"cos": torch.ones_like(call["cos"]), "sin": torch.zeros_like(call["sin"])}
    if "query_scale" in call:
        still["query_scale"] = torch.ones_like(call["query_scale"])
    if "k_scales" in call:  # in the cache keys are no more what the norm gave: they take the place of queries
        still["slots"] = torch.full_like(call["slots"], -1)
        k, v = call["qkv"][:, -2 * kv_heads * head_dim :].chunk(2, dim=1)
        keys = {"qkv": torch.cat([k, k, v], dim=1), "q_norm_weight": call["k_norm_weight"]}
        return rotate_and_cache(**call | still), rotate_and_cache(**call | still | keys)
    pages = call["k_pages"].new_empty(2, 1, n, kv_heads, head_dim)  # not the cache's
    still |= {"k_pages": pages[0], "v_pages": pages[1], "slots": torch.arange(n, device=pages.device)}
    q = rotate_and_cache(**call | still)
    return q, pages[0, 0]
