"""The matrix product that the packages use, on CPU."""

from __future__ import annotations

import pytest
import torch

from qwenspec_triton.kernels import linear as module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_against_float64(n: int, biased: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 96, generator=generator).to(dtype)
    x[:, 3] *= 40
    weight = torch.randn(80, 96, generator=generator).to(dtype)
    bias = torch.randn(80, generator=generator).to(dtype) if biased else None
    exact = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    actual = module.linear(x, weight, bias)
    assert actual.dtype == dtype
    assert actual.shape == exact.shape
    # Accumulated in float32, whose rounding adds up over 96 terms, then rounded once.
    tolerance = torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
    assert (actual.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_float32_goes_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Tensor] = []
    onednn = module._onednn
    assert onednn is not None, "this torch has no oneDNN product: packages would be slow on CPU"
    monkeypatch.setattr(module, "_onednn", lambda x, *rest: calls.append(x) or onednn(x, *rest))
    weight = torch.randn(4, 8)
    module.linear(torch.randn(2, 8), weight)
    module.linear(torch.randn(2, 8).bfloat16(), weight.bfloat16())
    assert [x.dtype for x in calls] == [torch.float32]
    monkeypatch.setattr(module, "_onednn", None)
    assert module.linear(torch.ones(2, 8), weight).allclose(weight.sum(1).expand(2, -1), atol=1e-5)
