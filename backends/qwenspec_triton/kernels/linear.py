"""Matrix products: cuBLAS on a GPU, oneDNN on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

# F.linear takes MKL for float32 on CPUs; oneDNN's product, the one that torch.compile chooses, is faster.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, accumulated in float32.

    x: [n, in]
    weight: [out, in]
    bias: [out]
    -> [n, out]
    """
    if _onednn is not None and x.dtype == torch.float32 and x.device.type == "cpu":
        return _onednn(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
