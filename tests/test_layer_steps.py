# SPDX-License-Identifier: MIT
"""rms_norm and rotary against the formulas in torch; rotations bit for bit."""

from __future__ import annotations

import pytest
import torch

from quantgemm import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As transformers' Llama: in float32, rounded before the product with weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4096), (3, 5, 64), (2, 33), (7, 1), (4, 20000), (0, 8)])
def test_rms_norm(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(device, dtype)
    weight = torch.randn(shape[-1], generator=generator).to(device, dtype)
    got, want = ops.rms_norm(x, weight, 1e-5), normalized(x, weight, 1e-5)
    assert got.dtype == dtype and got.shape == x.shape
    # A sum in another order moves a value by one unit before each of the two roundings.
    torch.testing.assert_close(got, want, rtol=3 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_rms_norm_of_what_is_no_number(device: str) -> None:
    x = torch.ones(3, 16, device=device)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    got = ops.rms_norm(x, torch.ones(16, device=device), 1e-5)
    assert got[0].isnan().all() and got[1, 5].isnan() and (got[1, :5] == 0).all()
    torch.testing.assert_close(got[2], torch.ones(16, device=device), rtol=1e-4, atol=0)
    x = torch.ones(2, 17, device=device)[:, 1:]  # starts anywhere, rows apart
    torch.testing.assert_close(ops.rms_norm(x, x[0], 0.0), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens, channels", [(1, 1, 128), (2, 5, 64), (3, 7, 6), (1, 0, 8)])
def test_rotary(device: str, dtype: torch.dtype, batch: int, tokens: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(1)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    # As models have them: heads beside each other in a token's row.
    q = some(batch, tokens, 4, channels).transpose(1, 2)
    k = some(batch, tokens, 2, channels).transpose(1, 2)
    for shared in (1, batch):
        angles = some(shared, tokens, channels)
        cos, sin = angles.cos(), angles.sin()
        for x, got in zip((q, k), ops.rotary(q, k, cos, sin), strict=True):
            assert torch.equal(got, rotated(x, cos, sin)) and got.is_contiguous()
    apart = some(batch, 4, tokens, 2 * channels)[..., ::2]
    got = ops.rotary(apart, k, cos, sin)[0]
    assert torch.equal(got, rotated(apart, cos, sin))


def test_mistakes() -> None:
    x = torch.ones(2, 4, 3, 8)
    angles = torch.ones(1, 3, 8)
    with pytest.raises(ValueError, match=r"weight: expected shape \[8\], got \[7\]"):
        ops.rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(TypeError, match=r"weight: expected torch.float32 as x, got torch.float16"):
        ops.rms_norm(x, torch.ones(8).half(), 1e-5)
    with pytest.raises(TypeError, match=r"x: expected torch.float32, .* got torch.int64"):
        ops.rms_norm(x.long(), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match=r"q: expected \[batch, heads, tokens, channels\], got"):
        ops.rotary(x[0], x, angles, angles)
    with pytest.raises(ValueError, match=r"q: expected an even number of channels, got 7"):
        ops.rotary(x[..., :7], x[..., :7], angles[..., :7], angles[..., :7])
    with pytest.raises(ValueError, match=r"k: expected \[2, heads, 3, 8\], got \[2, 4, 2, 8\]"):
        ops.rotary(x, x[:, :, :2], angles, angles)
    with pytest.raises(ValueError, match=r"sin: expected \[2 or 1, 3, 8\], got \[1, 3, 6\]"):
        ops.rotary(x, x, angles, angles[..., :6])
    with pytest.raises(TypeError, match=r"cos: expected torch.float32 as q, got torch.bfloat16"):
        ops.rotary(x, x, angles.bfloat16(), angles)
