# SPDX-License-Identifier: MIT
"""quantize_activations against the formula in torch, and CUDA against CPU bytes."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES

from quantgemm import ops


def unpack(rows: torch.Tensor, cols: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 [..., row_bytes] -> int8 codes [..., cols], float32 scales and sums [..., cols/32]"""
    rows = rows.cpu()
    codes = rows[..., :cols].contiguous().view(torch.int8)
    pairs = rows[..., cols : cols + cols // 4].contiguous().view(torch.float32)
    return codes, pairs[..., ::2], pairs[..., 1::2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (2, 5, 4096), (7, 14336)])
def test_formula(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[..., 5] *= 100  # an outlier
    rows = ops.quantize_activations(x.to(device))
    cols = shape[-1]
    assert rows.shape == (*shape[:-1], ops.activation_row_bytes(cols)) and rows.dtype == torch.uint8
    codes, scales, sums = unpack(rows, cols)
    groups = x.float().unflatten(-1, (-1, 32))
    assert torch.equal(scales, groups.abs().amax(-1) / 127)
    q = codes.float().unflatten(-1, (-1, 32))
    assert torch.equal(sums, scales * q.sum(-1))
    error = (q * scales[..., None] - groups).abs()
    assert (error <= 0.5001 * scales[..., None]).all()
    padding = rows.cpu()[..., cols + cols // 4 :]
    assert not padding.any()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_bytes_are_cpu_bytes(dtype: torch.dtype) -> None:
    x = torch.randn(140_001, 96, generator=torch.Generator().manual_seed(2)).mul(30).to(dtype)
    x[0], x[1], x[2, 3], x[3, 3], x[4] = 0, 1e-30, float("nan"), float("-inf"), 65504
    assert torch.equal(ops.quantize_activations(x.cuda()).cpu(), ops.quantize_activations(x))


@pytest.mark.parametrize("device", DEVICES)
def test_special_values(device: str) -> None:
    x = torch.zeros(4, 64)
    x[1, 0], x[2, 40], x[3, 1] = float("nan"), float("inf"), 3e38
    codes, scales, sums = unpack(ops.quantize_activations(x.to(device)), 64)
    assert not scales[0].any() and not sums[0].any() and not codes[0].any()
    assert scales[1, 0].isnan() and sums[1, 0].isnan() and scales[1, 1] == 0
    assert scales[2, 1].isinf() and not sums[2, 1].isfinite()
    assert codes[3, 1] == 127 and scales[3, 0] > 2e36


@pytest.mark.parametrize("device", DEVICES)
def test_empty_and_mistakes(device: str) -> None:
    assert ops.quantize_activations(torch.zeros(0, 64, device=device)).shape == (0, 80)
    assert ops.quantize_activations(torch.zeros(3, 0, device=device)).shape == (3, 0)
    with pytest.raises(ValueError, match="x: row of 33 values is not a multiple of the 32-value"):
        ops.quantize_activations(torch.zeros(2, 33, device=device))
    with pytest.raises(TypeError, match=r"x: expected torch.float32.*got torch.int32"):
        ops.quantize_activations(torch.zeros(2, 32, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="at least one dimension"):
        ops.quantize_activations(torch.zeros((), device=device))
