# SPDX-License-Identifier: MIT
"""The int8 product of packed weights: against the same rounding in torch, and what it costs."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import DEVICES
from test_gemm import random_weights, random_x
from test_packed import PACKED, by_name, on_devices

from quantgemm import QuantLinear, explain_gemm, ops
from quantgemm.formats import Format, QType

GROUP = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def able(device: str) -> bool:
    plan = explain_gemm(64, 64, 256, "Q4_K", device, packed=True)
    return "int8" in plan.available


def skip_unless_able(device: str) -> None:
    if not able(device):
        pytest.skip("no int8 products here")


def rounded(v: torch.Tensor) -> torch.Tensor:
    """Numbers to int8 and back, per row and 256 columns, as csrc/int8_product.h says."""
    rows, cols = v.shape
    groups = -(-cols // GROUP)
    v = torch.nn.functional.pad(v.float(), (0, groups * GROUP - cols)).view(rows, groups, GROUP)
    largest = v.abs().amax(2, keepdim=True)
    scale = largest / torch.full_like(largest, 127)
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    codes = torch.round(v.double() * inverse.double()).clamp(-127, 127)
    return (codes * scale.double()).view(rows, -1)[:, :cols]


def wanted(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y in float64, and how far sums of another order may be from it."""
    a, b = rounded(x), rounded(weights.float())
    return a @ b.T, 1e-5 * (a.abs() @ b.abs().T) + 1e-12


def assert_close(y: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> None:
    half_unit = 0.0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps / 2
    assert y.shape == want.shape
    assert ((y.double() - want).abs() <= bound + 1.01 * half_unit * want.abs()).all()


@on_devices
@by_name
def test_same_rounding(fmt: Format, device: str) -> None:
    """Ragged sizes, columns that fill no group, one and several tiles; every dtype."""
    skip_unless_able(device)
    e = fmt.block_elems
    sizes = ((1, 1, e), (17, 33, 3 * e), (130, 257, 2048 + e), (300, 520, 1024))
    for (m, n, k), dtype in itertools.product(sizes if device == "cuda" else sizes[:2], DTYPES):
        w, weights = random_weights(fmt, n, k, device)
        x = random_x(m, k, dtype=dtype, device=device)
        packed = ops.pack(w, fmt.type_id)
        want, bound = wanted(x, weights)
        y = ops.gemm_packed(x, packed, fmt.type_id, n, k, algo="int8")
        assert_close(y, want, bound)
        assert torch.equal(y, ops.gemm_packed(x, packed, fmt.type_id, n, k, algo="int8"))
        first = ops.gemm_packed(x[:1], packed, fmt.type_id, n, k, algo="int8")
        assert torch.equal(first, y[:1])


@on_devices
def test_bias_residual_and_gate(device: str) -> None:
    skip_unless_able(device)
    n, k = 200, 768
    w, weights = random_weights(PACKED[0], n, k, device)
    packed = ops.pack(w, PACKED[0].type_id)
    args = PACKED[0].type_id, n, k
    for dtype, columns in itertools.product(DTYPES, (n, 199)):
        x = random_x(40, k, dtype=dtype, device=device)
        bias, residual = (
            random_x(1, columns, dtype=dtype, device=device)[0],
            random_x(40, columns, dtype=dtype, device=device),
        )
        sizes = args[0], columns, k
        want, bound = wanted(x, weights[:columns])
        y = ops.gemm_packed(x, packed, *sizes, algo="int8")
        eps = torch.finfo(dtype).eps
        loose = bound + 3 * eps * (want.abs() + bias.abs() + residual.abs().double())
        with_both = ops.gemm_packed(x, packed, *sizes, bias, "int8", residual)
        assert ((with_both.double() - want - bias - residual).abs() <= loose).all()
        assert_close(y, want, bound)
        gated = ops.gemm_packed_gated(x, packed, packed, *sizes, "int8").double()
        of_y = torch.nn.functional.silu(want) * want
        assert ((gated - of_y).abs() <= 8 * eps * of_y.abs() + 4 * bound * (1 + want.abs())).all()


@on_devices
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(value: float, device: str) -> None:
    """Its row of y is NaN, and no other."""
    skip_unless_able(device)
    n, k = 40, 512
    w, _ = random_weights(PACKED[0], n, k, device)
    x = random_x(20, k, dtype=torch.bfloat16, device=device)
    x[3, 5] = value
    y = ops.gemm_packed(x, ops.pack(w, PACKED[0].type_id), PACKED[0].type_id, n, k, algo="int8")
    assert y[3].isnan().all()
    assert y[:3].isfinite().all() and y[4:].isfinite().all()


def test_error_is_as_documented() -> None:
    """Relative to y in its norm: docs/performance.md has the table."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4096, generator=generator)
    w = ops.quantize(torch.randn(128, 4096, generator=generator), QType.Q4_K)
    weights = ops.dequantize(w, QType.Q4_K).double()
    packed = ops.pack(w, QType.Q4_K)
    for factor, most in ((1, 1.1e-2), (10, 2.4e-2), (50, 3.7e-2)):
        values = x.clone()
        values[:, ::200] *= factor
        exact = values.double() @ weights.T
        y = ops.gemm_packed(values, packed, QType.Q4_K, 128, 4096, algo="int8")
        assert (y - exact).norm() <= most * exact.norm()
        assert (y - exact).norm() >= 0.8 * most * exact.norm()  # the bound says something


def test_never_chosen_by_auto() -> None:
    sizes = {"n": 4096, "k": 4096, "qtype": "Q4_K", "packed": True}
    for m in (1, 512, 4096, 65536):
        assert explain_gemm(m, device="sm_90", **sizes).algo != "int8"
    few = explain_gemm(64, device="cpu", algo="auto_int8", **sizes)
    assert few.algo == "auto" and "would not be faster" in few.reason
    many = explain_gemm(4096, device="cpu", algo="auto_int8", **sizes)
    assert many.algo == "int8" and many.rounds_activations
    assert "weights" in str(many)
    for algo in ("int8", "auto_int8"):
        with pytest.raises(NotImplementedError, match=r"9\.0"):
            explain_gemm(4096, device="sm_80", algo=algo, **sizes)


def test_experts_have_none() -> None:
    packed = ops.pack(torch.zeros(64, 144, dtype=torch.uint8), QType.Q4_K)[None]
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="experts have no int8 product"):
        ops.moe_gemm(torch.zeros(1, 256), packed, QType.Q4_K, 64, 256, ids, algo="int8")
    with pytest.raises(ValueError, match="algo"):
        ops.moe_gemm(torch.zeros(1, 256), packed, QType.Q4_K, 64, 256, ids, algo="auto_int8")


@pytest.mark.parametrize("device", DEVICES)
def test_layers(device: str) -> None:
    skip_unless_able(device)
    generator = torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(256, 1024, device=device)
    layer = QuantLinear.from_linear(linear, "Q4_0").requires_grad_(False)
    x = torch.randn(2048, 256, generator=generator).to(device)
    exact = layer.pack()(x)
    few = layer(x[:4])
    layer.pack(precision="int8")
    assert torch.equal(layer(x[:4]), few)
    y = layer(x)
    assert 1e-3 < (y - exact).norm() / exact.norm() < 2e-2
    assert layer.unpack().precision is None
    with pytest.raises(ValueError, match="precision"):
        layer.pack(precision="int4")
