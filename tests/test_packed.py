# SPDX-License-Identifier: MIT
"""pack, unpack and gemm_packed: the layout against a plain loop over its description, unpack as the
exact inverse for any bytes, and products against float64 with torch's own error as the measure."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from conftest import BLOCK_FORMATS, DEVICES, assert_same, random_blocks
from test_gemm import assert_near, random_weights, random_x

from quantgemm import _C, explain_gemm, ops
from quantgemm.formats import FORMATS, Format, QType, format_by_id, format_by_name

PACKED = [FORMATS[row["type_id"]] for row in _C.format_table() if row["can_pack"]]
NAMES = """Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4 NVFP4 TQ2_0 Q2_0"""
WITH_OFFSETS = {row["type_id"] for row in _C.format_table() if row["has_offset"]}
on_devices = pytest.mark.parametrize("device", DEVICES)
by_name = pytest.mark.parametrize("fmt", PACKED, ids=lambda f: f.name)


def algos(device: str, dtype: torch.dtype) -> list[str]:
    if device == "cpu":
        return ["auto"]
    plan = explain_gemm(64, 64, 256, "Q4_K", device, dtype, packed=True)
    return ["auto", *(algo for algo in plan.available if algo != "int8")]


def assert_accurate(y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> None:
    """At most twice the error of torch's product in the same dtype, by the maximum of each row.

    A short row of a short product may come out of torch exactly: half a unit in the last place of
    the row's largest number counts as an error that it could have had.
    """
    want = x.double() @ weights.T
    assert y.dtype == x.dtype and y.shape == want.shape
    if y.numel() == 0:
        return
    own = ((x @ weights.to(x.dtype).T).double() - want).abs().amax(1, keepdim=True)
    half_unit = want.abs().amax(1, keepdim=True) * torch.finfo(y.dtype).eps / 2
    floor = 1e-6 * (x.double().abs() @ weights.abs().T)
    assert_near(y, want, 2 * torch.maximum(own, half_unit) + floor + 1e-12)


def test_which_types() -> None:
    assert {fmt.name for fmt in PACKED} == set(NAMES.split())


def bytes_of(fmt: Format, n: int, k: int, device: str, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(random_blocks(fmt, n, k, seed)).to(device)


@on_devices
@by_name
def test_unpack_is_the_inverse(fmt: Format, device: str) -> None:
    """Any bytes, NaN scales among them; n and k that fill no strip and no tile."""
    e = fmt.block_elems
    for n, k in itertools.product((1, 16, 33, 64, 130), (e, 3 * e, 2048, 2048 + e, 4096)):
        w = bytes_of(fmt, n, k, device)
        packed = ops.pack(w, fmt.type_id)
        assert packed.shape == ops.packed_shape(fmt.type_id, n, k)
        assert torch.equal(ops.unpack(packed, fmt.type_id, n, k), w)
        assert torch.equal(packed.cpu(), ops.pack(w.cpu(), fmt.type_id))


@by_name
def test_no_larger_than_the_blocks(fmt: Format) -> None:
    """Beside the padding of n to 64, and of k to 64 that only short rows notice."""
    for n, k in ((64, 256), (128, 4096), (4096, 11008)):
        strips, strip_bytes = ops.packed_shape(fmt.type_id, n, k)
        assert strips * strip_bytes == n * fmt.row_bytes(k)
    k = 2048 + fmt.block_elems
    strips, strip_bytes = ops.packed_shape(fmt.type_id, 64, k)
    assert strips * strip_bytes <= 1.03 * 64 * fmt.row_bytes(k)


@by_name
def test_layout_as_described(fmt: Format) -> None:
    """csrc/formats/packed.h in words of its own: one bit of the blocks is one bit of a strip.

    Where it lies says which weight it belongs to, and the numpy decoder must agree.
    """
    k, n = max(fmt.block_elems, 128), 64
    w = random_blocks(fmt, n, k)
    code_bits = {"Q8_0": 8, "Q6_K": 6, "Q5_K": 5, "Q5_0": 5, "Q5_1": 5, "Q3_K": 3}.get(fmt.name)
    code_bits = code_bits or (2 if "2_" in fmt.name else 4)
    planes = {8: [8], 6: [4, 2], 5: [4, 1], 4: [4], 3: [2, 1], 2: [2]}[code_bits]
    packed = ops.pack(torch.from_numpy(w), fmt.type_id).numpy()
    bits = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), -1)
    rng = np.random.default_rng(fmt.type_id)
    row_bits = np.unpackbits(w, axis=1, bitorder="little")
    tiles = k // 64
    head_begin = tiles * 128 * code_bits * 8
    moved = np.zeros(row_bits.shape[1], bool)
    for bit in rng.permutation(row_bits.shape[1])[:200]:
        row = int(rng.integers(n))
        changed = row_bits[row].copy()
        changed[bit] ^= 1
        again = w.copy()
        again[row] = np.packbits(changed, bitorder="little")
        new = ops.pack(torch.from_numpy(again), fmt.type_id).numpy()
        where = np.argwhere(np.unpackbits(new, axis=1, bitorder="little") != bits)
        assert len(where) == 1 and where[0][0] == row // 16, "one bit, in the row's strip"
        at, moved[bit] = int(where[0][1]), True
        if at >= head_begin:
            continue
        # The place says which weight it is: does the decoder agree?
        begin, plane = 0, 0
        while at >= begin + tiles * 1024 * planes[plane]:
            begin, plane = begin + tiles * 1024 * planes[plane], plane + 1
        tile, within = divmod(at - begin, 1024 * planes[plane])
        col, strip_row = weight_at(planes[plane], within)
        assert strip_row == row % 16
        weights = fmt.decode(w[row : row + 1])[0], fmt.decode(again[row : row + 1])[0]
        same = (weights[0] == weights[1]) | (np.isnan(weights[0]) & np.isnan(weights[1]))
        assert set(np.flatnonzero(~same)) <= {tile * 64 + col}
    assert moved.sum() >= min(200, len(moved))


def weight_at(bits: int, at: int) -> tuple[int, int]:
    """Column and row in a tile of the weight that bit `at` of the tile's plane belongs to."""
    if bits == 8:
        pair_of_steps, at = divmod(at, 32 * 128)
        lane, at = divmod(at, 128)
        word, at = divmod(at, 32)
        step, high_row = 2 * pair_of_steps + word // 2, word % 2
        high_col, which = at // 8 % 2, at // 16
    else:
        lane, at = divmod(at, 32 * bits)
        word, at = divmod(at, 32)
        which, field = at // 16, at % 16 // bits
        step, pair = word * (4 // bits) + field // 4, field % 4
        high_row, high_col = pair % 2, pair // 2
    return 16 * step + 8 * high_col + 2 * (lane % 4) + which, lane // 4 + 8 * high_row


@on_devices
@by_name
def test_products(fmt: Format, device: str) -> None:
    e = fmt.block_elems
    sizes = [(1, 64, 4096), (2, 33, 3 * e), (7, 257, e), (8, 8, 4096), (33, 130, 3 * e), (0, 9, e)]
    if device == "cuda":
        sizes += [(m, 200, 1024 + e) for m in (1, 3, 9, 16, 17, 70)] + [
            (8, 40, 14336),
            (1, 3000, 512),
        ]
    for (m, n, k), dtype in itertools.product(
        sizes, (torch.float32, torch.float16, torch.bfloat16)
    ):
        w, weights = random_weights(fmt, n, k, device)
        x, bias = (
            random_x(m, k, dtype=dtype, device=device),
            random_x(n, dtype=dtype, device=device),
        )
        packed = ops.pack(w, fmt.type_id)
        for algo in algos(device, dtype):
            y = ops.gemm_packed(x, packed, fmt.type_id, n, k, None, algo)
            assert_accurate(y, x, weights)
            biased = ops.gemm_packed(x, packed, fmt.type_id, n, k, bias, algo)
            want = (y.double() + bias.double()).abs()
            error = (biased.double() - y.double() - bias.double()).abs()
            assert (error <= torch.finfo(dtype).eps * (want + y.double().abs()) + 1e-30).all()


@on_devices
@by_name
def test_residual_and_gate(fmt: Format, device: str) -> None:
    """silu(gate) · up and a residual, against float64 of the products' own formulas."""
    e = fmt.block_elems
    sizes = [(1, 40, 3 * e), (8, 200, e), (33, 130, 1024)]
    if device == "cuda":
        sizes += [(3, 3000, 1024 + e), (2, 64, 14336), (300, 264, 768)]
    for (m, n, k), dtype in itertools.product(sizes, (torch.float32, torch.bfloat16)):
        pairs = [random_weights(fmt, n, k, device, seed) for seed in (1, 2)]
        gate, up = (ops.pack(w, fmt.type_id) for w, _ in pairs)
        x = random_x(m, k, dtype=dtype, device=device) / 8
        residual = random_x(m, n, dtype=dtype, device=device, seed=3)
        products = [x.double() @ weights.T for _, weights in pairs]
        want = torch.nn.functional.silu(products[0]) * products[1]
        # As rounded factors would have it: wgmma rounds weights, and both products.
        eps = torch.finfo(dtype).eps
        sizes_of_terms = [x.double().abs() @ weights.abs().T for _, weights in pairs]
        bound = sizes_of_terms[0] * products[1].abs() + products[0].abs() * sizes_of_terms[1]
        bound = (1e-6 + eps * (m > 8)) * bound + 4 * eps * want.abs() + 1e-12
        for algo in algos(device, dtype):
            if algo == "wgmma" and m <= 8:
                continue
            y = ops.gemm_packed_gated(x, gate, up, fmt.type_id, n, k, algo)
            assert y.dtype == dtype
            assert_near(y, want, bound)
            plain = ops.gemm_packed(x, gate, fmt.type_id, n, k, None, algo).double()
            more = ops.gemm_packed(x, gate, fmt.type_id, n, k, None, algo, residual).double()
            size = plain.abs() + residual.double().abs()
            assert ((more - plain - residual.double()).abs() <= 2 * eps * size).all()
    twice = ops.gemm_packed_gated(x, gate, gate.clone(), fmt.type_id, n, k)
    assert torch.equal(ops.gemm_packed_gated(x, gate, gate, fmt.type_id, n, k), twice)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@on_devices
@by_name
def test_norm_in_front(fmt: Format, device: str) -> None:
    """Inside of a product what float64 says; in front of it, the bits of rms_norm and a product."""
    e = fmt.block_elems
    ks = [e, 3 * e, 4096 + e]
    ms: list[int] = [1, 3, 9]
    if device == "cuda":  # ones with several panels, and passes of eight tokens
        ks, ms = [*ks, 8192, 14336, 28672], list(range(1, 10))
    dtypes = [torch.float16, torch.bfloat16, *([torch.float32] if device == "cpu" else [])]
    for k, dtype in itertools.product(ks, dtypes):
        n = 70 if k > 8192 else 200
        blocks, weights = zip(
            *(random_weights(fmt, n, k, device, seed) for seed in (1, 2)), strict=True
        )
        w, up = (ops.pack(each, fmt.type_id) for each in blocks)
        bias = random_x(n, dtype=dtype, device=device, seed=5)
        weight = random_x(k, dtype=dtype, device=device, seed=4) + 1
        for m in ms:
            x = 3 * random_x(m, k, dtype=dtype, device=device, seed=m)
            residual = random_x(m, n, dtype=dtype, device=device, seed=6)
            plain = ops.rms_norm(x, weight, 1e-5)
            for algo in ("auto", *(["gemv"] if device == "cuda" else [])):
                rest = fmt.type_id, n, k
                got = ops.gemm_packed(x, w, *rest, bias, algo, residual, weight, 1e-5)
                gated = ops.gemm_packed_gated(x, w, up, *rest, algo, weight, 1e-5)
                plan = explain_gemm(m, n, k, fmt.name, device, dtype, packed=True)
                inside = plan.folds_norm or (algo == "gemv" and dtype == torch.bfloat16)
                if not inside:
                    want = ops.gemm_packed(plain, w, *rest, bias, algo, residual)
                    assert_same_bits(got, want)
                    assert_same_bits(gated, ops.gemm_packed_gated(plain, w, up, *rest, algo))
                    continue
                factor = (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
                rows = (x * weight).double() * factor  # rounded products, and no factor yet
                sums = [rows @ each.T for each in weights]
                sizes = [rows.abs() @ each.abs().T for each in weights]
                want = sums[0] + bias.double() + residual.double()
                size = sums[0].abs() + bias.double().abs() + residual.double().abs()
                eps = torch.finfo(dtype).eps
                assert_near(got, want, 4e-6 * (sizes[0] + size) + eps * want.abs() + 1e-12)
                want = torch.nn.functional.silu(sums[0]) * sums[1]
                size = sizes[0] * sums[1].abs() + sums[0].abs() * sizes[1]
                assert_near(gated, want, 4e-6 * size + 4 * eps * want.abs() + 1e-12)


@pytest.mark.cuda
@by_name
def test_norm_inside_is_the_same_in_any_batch(fmt: Format) -> None:
    """Bit for bit: as a row alone and as one of eight, in one panel of columns and in several."""
    e = fmt.block_elems
    for k in (e, 3 * e, 4096, 5120 + e, 8192, 14336, 18944, 28672):
        if k % e != 0:
            continue
        n = 70 if k > 8192 else 200
        w, up = (ops.pack(random_weights(fmt, n, k, "cuda", s)[0], fmt.type_id) for s in (1, 2))
        dtype = torch.bfloat16
        weight = random_x(k, dtype=dtype, device="cuda", seed=4) + 1
        x = 3 * random_x(8, k, dtype=dtype, device="cuda", seed=3)
        x[1] *= 1e-4  # where eps matters
        x[2, 5] = 3e4
        residual = random_x(8, n, dtype=dtype, device="cuda", seed=6)

        inside = {"algo": "gemv", "norm_weight": weight, "norm_eps": 1e-5}
        gated = partial(ops.gemm_packed_gated, gate=w, up=up, qtype=fmt.type_id, n=n, k=k, **inside)
        plain = partial(ops.gemm_packed, packed=w, qtype=fmt.type_id, n=n, k=k, **inside)
        whole = [plain(x), plain(x, residual=residual), gated(x)]
        some = [slice(i, i + 1) for i in range(8)] + [slice(0, 2), slice(3, 6), slice(2, 7)]
        for rows in some:
            got = [plain(x[rows]), plain(x[rows], residual=residual[rows]), gated(x[rows])]
            for mine, want in zip(got, whole, strict=True):
                assert_same_bits(mine, want[rows])


@on_devices
@by_name
def test_norm_of_what_is_no_number(fmt: Format, device: str) -> None:
    """Infinite and NaN where those of rms_norm and a product after it are."""
    n, k = 70, max(512, fmt.block_elems)
    packed = ops.pack(random_weights(fmt, n, k, device)[0], fmt.type_id)
    for dtype in (torch.float16, torch.bfloat16):
        x = random_x(6, k, dtype=dtype, device=device)
        x[1, 3], x[2, 17], x[3] = float("inf"), float("nan"), 0
        weight = random_x(k, dtype=dtype, device=device, seed=4)
        for weight[5], eps in itertools.product((1.0, float("inf"), float("nan")), (0.0, 1e-5)):
            args = packed, fmt.type_id, n, k, None, "auto", None, weight, eps
            want = ops.gemm_packed(ops.rms_norm(x, weight, eps), packed, fmt.type_id, n, k)
            got = ops.gemm_packed(x, *args)
            finite = want.isfinite()
            torch.testing.assert_close(got[~finite], want[~finite], equal_nan=True)
            if finite.any():
                atol = 2**-6 * float(want[finite].abs().max())
                torch.testing.assert_close(got[finite], want[finite], rtol=0, atol=atol)
            for rows in (slice(0, 6), slice(0, 1), slice(1, 2), slice(3, 4)):
                assert_same_bits(ops.gemm_packed(x[rows], *args), got[rows])


@pytest.mark.cuda
def test_norm_in_graphs_and_one_launch() -> None:
    """A chain of products as of layers, each with its norm; x and weights that start anywhere."""
    fmt, k = FORMATS[QType.Q4_K], 2048
    packed = ops.pack(random_weights(fmt, k, k, "cuda")[0], fmt.type_id)
    weight = random_x(k + 1, dtype=torch.bfloat16, device="cuda", seed=4)[1:]
    x = random_x(2, 3, 2 * k, dtype=torch.bfloat16, device="cuda")[..., ::2]
    static = x.clone()

    def chain(x: torch.Tensor, fold: bool) -> torch.Tensor:
        for _ in range(5):
            norm = (weight, 1e-5) if fold else ()
            y = x if fold else ops.rms_norm(x, weight, 1e-5)
            x = ops.gemm_packed(y, packed, fmt.type_id, k, k, None, "auto", x.contiguous(), *norm)
        return x

    want, got = chain(x, fold=False).double(), chain(x, fold=True).double()
    assert (got - want).norm() < 0.05 * want.norm()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(static, fold=True)
    for factor in (1.0, 2.0):
        static.copy_(factor * x)
        graph.replay()
        assert torch.equal(out, chain(factor * x, fold=True))
    activities = [torch.profiler.ProfilerActivity.CUDA]
    counts = []
    for fold in (False, True):
        with torch.profiler.profile(activities=activities) as found:
            chain(static, fold)
            torch.cuda.synchronize()
        counts.append(sum(e.count for e in found.key_averages() if "quantgemm" in e.key))
    assert counts == [10, 5]


def test_who_has_the_norm_inside() -> None:
    def folds(m: int, **more: object) -> bool:
        args = {"device": "sm_90", "dtype": torch.bfloat16, "packed": True} | more
        return explain_gemm(m, 64, 256, "Q4_K", **args).folds_norm  # type: ignore[arg-type]

    assert folds(1) and folds(8) and folds(8, algo="auto_int8") and folds(3, device="sm_80")
    assert not folds(9) and not folds(1, dtype=torch.float32) and not folds(1, device="cpu")
    assert not folds(1, dtype=torch.float16)  # x · weight could overflow
    long = explain_gemm(2, 64, 16384, "Q4_K", "sm_90", packed=True, dtype=torch.bfloat16)
    assert long.algo == "few" and not long.folds_norm
    assert not folds(1, packed=False)
    plan = explain_gemm(1, 64, 256, "Q4_K", "sm_90", packed=True, dtype=torch.bfloat16)
    assert "norm_weight takes no launch of its own" in str(plan)


@on_devices
@by_name
def test_infinite_and_nan_activations(fmt: Format, device: str) -> None:
    """They reach y as the weights' own product says, in the rows of x that have them alone."""
    n, k = 70, max(256, fmt.block_elems)
    w, weights = random_weights(fmt, n, k, device)
    packed = ops.pack(w, fmt.type_id)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = random_x(4, k, dtype=dtype, device=device)
        x[1, 3], x[2, 17] = float("inf"), float("nan")
        want = x.double() @ weights.T
        for algo in algos(device, dtype):
            y = ops.gemm_packed(x, packed, fmt.type_id, n, k, None, algo).double()
            assert torch.equal(y.isnan(), want.isnan()) and y[[0, 3]].isfinite().all()
            assert torch.equal(y.isinf() & (y > 0), want.isinf() & (want > 0))


@pytest.mark.cuda
@by_name
def test_gemv_rows_do_not_depend_on_the_batch(fmt: Format) -> None:
    for n, k in ((300, 4096), (64, 14336), (40, 1024 + fmt.block_elems)):
        packed = ops.pack(random_weights(fmt, n, k, "cuda")[0], fmt.type_id)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = random_x(8, k, dtype=dtype, device="cuda")
            whole = ops.gemm_packed(x, packed, fmt.type_id, n, k, None, "gemv")
            for i, m in ((0, 1), (2, 3), (3, 5), (7, 1)):
                part = ops.gemm_packed(x[i : i + m], packed, fmt.type_id, n, k, None, "gemv")
                assert torch.equal(part, whole[i : i + m])
            again = ops.gemm_packed(x, packed, fmt.type_id, n, k, None, "gemv")
            assert torch.equal(again, whole)


@pytest.mark.cuda
@by_name
def test_few_tokens(fmt: Format) -> None:
    """Tiles of 8 and 16 tokens, several passes, rows shared by blocks of a cluster or not."""
    if "few" not in algos("cuda", torch.bfloat16):
        pytest.skip("few is of compute capability 9.0")
    e = fmt.block_elems
    sizes = [(64, e), (200, 3 * e), (77, 1024 + e), (4096, 4096), (4096 + 40, 2048), (17000, 512)]
    sizes.append((48, 18944))  # several runs of columns, of which the next comes while one is used
    for (n, k), dtype in itertools.product(sizes, (torch.float16, torch.bfloat16)):
        w, weights = random_weights(fmt, n, k, "cuda")
        packed = ops.pack(w, fmt.type_id)
        x = random_x(70, k, dtype=dtype, device="cuda")
        args = packed, fmt.type_id, n, k, None, "few"
        whole = ops.gemm_packed(x, *args)
        assert_accurate(whole, x, weights)
        for first, m in ((0, 70), (0, 1), (5, 8), (3, 9), (1, 16), (20, 17), (7, 33)):
            rows = slice(first, first + m)
            assert torch.equal(ops.gemm_packed(x[rows], *args), whole[rows])
        if dtype == torch.float16:  # products of random weights leave its range
            continue
        residual = random_x(70, n, dtype=dtype, device="cuda")
        up = ops.pack(random_weights(fmt, n, k, "cuda", seed=1)[0], fmt.type_id)
        sizes_of = fmt.type_id, n, k
        close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0.01 * float(whole.float().std())}
        got = ops.gemm_packed(x, *args, residual).float()
        torch.testing.assert_close(got, whole.float() + residual.float(), **close)
        got, want = (
            ops.gemm_packed_gated(x[:13], packed, up, *sizes_of, algo).float()
            for algo in ("few", "gemv")
        )
        close["atol"] = 0.01 * float(want.std())
        torch.testing.assert_close(got, want, **close)


PAIRS = [("Q4_K", "Q6_K"), ("Q5_K", "Q6_K"), ("Q4_K", "Q5_K")]  # of one launch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", [*PAIRS, ("Q6_K", "Q4_K"), ("Q8_0", "Q6_K"), ("Q4_K", "Q4_K")])
def test_two_weights_of_one_x(names: tuple[str, str], device: str) -> None:
    """In one launch or two: what each has alone."""
    one, other = (format_by_name(name) for name in names)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    sizes = [(64, 64, 256), (320, 40, 1024), (16, 1000, 4096), (1000, 16, 512), (5120, 1024, 4096)]
    sizes.append(
        (6144, 1024, 6144)
    )  # beside the first, the other's blocks want more panels than alone
    for (n, other_n, k), dtype in itertools.product(sizes[: 4 if device == "cpu" else 6], dtypes):
        packed = ops.pack(random_weights(one, n, k, device)[0], one.type_id)
        others = ops.pack(random_weights(other, other_n, k, device)[0], other.type_id)
        for m in (1, 2, 8, 9) if n < 1000 else (1, 5):
            x = random_x(m, k, dtype=dtype, device=device)
            x[-1, 0] = torch.inf if m == 2 else x[-1, 0]
            got = ops.gemm_packed_pair(x, packed, one.type_id, n, others, other.type_id, other_n, k)
            assert_same_bits(got[0], ops.gemm_packed(x, packed, one.type_id, n, k))
            assert_same_bits(got[1], ops.gemm_packed(x, others, other.type_id, other_n, k))
            norm = random_x(k, dtype=dtype, device=device, seed=4), 1e-5
            got_norm = ops.gemm_packed_pair(
                *(x, packed, one.type_id, n, others, other.type_id, other_n, k, "auto", *norm)
            )
            args = None, "auto", None, *norm
            want = ops.gemm_packed(x, packed, one.type_id, n, k, *args)
            assert_same_bits(got_norm[0], want)
            want = ops.gemm_packed(x, others, other.type_id, other_n, k, *args)
            assert_same_bits(got_norm[1], want)
            turned = x.t().contiguous().t()  # x and weights that are copied first
            strided = torch.stack([others, others], -1)[..., 0]
            same = ops.gemm_packed_pair(
                turned, packed, one.type_id, n, strided, other.type_id, other_n, k
            )
            for a, b in zip(got, same, strict=True):
                assert_same_bits(a, b)
    empty = ops.gemm_packed_pair(x[:0], packed, one.type_id, n, others, other.type_id, other_n, k)
    assert [y.shape for y in empty] == [(0, n), (0, other_n)]
    with pytest.raises(ValueError, match="other: expected"):
        ops.gemm_packed_pair(x, packed, one.type_id, n, others[:-1], other.type_id, other_n, k)
    with pytest.raises(NotImplementedError, match="gemm_packed_pair has no gradient"):
        leaf = x.clone().requires_grad_()
        ops.gemm_packed_pair(leaf, packed, one.type_id, n, others, other.type_id, other_n, k)


@pytest.mark.cuda
@pytest.mark.parametrize("names", PAIRS)
def test_one_launch_of_two_weights(names: tuple[str, str]) -> None:
    one, other = (format_by_name(name) for name in names)
    packed = ops.pack(random_weights(one, 320, 1024, "cuda")[0], one.type_id)
    others = ops.pack(random_weights(other, 64, 1024, "cuda")[0], other.type_id)
    for m, launches, normed in ((1, 1, 0), (8, 1, 0), (9, 2, 0), (1, 1, 1), (8, 1, 1), (9, 3, 1)):
        x = random_x(m, 1024, dtype=torch.bfloat16, device="cuda")
        norm = {"norm_weight": x[0], "norm_eps": 1e-5} if normed else {}
        args = x, packed, one.type_id, 320, others, other.type_id, 64, 1024
        call = partial(ops.gemm_packed_pair, *args, **norm)
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            call()
            torch.cuda.synchronize()
        kernels = [e for e in found.key_averages() if e.key.startswith("void quantgemm")]
        assert sum(e.count for e in kernels) == launches, [e.key for e in kernels]


@pytest.mark.cuda
@by_name
def test_tiles_of_wgmma(fmt: Format) -> None:
    """All tiles of tokens, one and several of them, whole and shared columns, ragged n, m and k."""
    if "wgmma" not in algos("cuda", torch.bfloat16):
        pytest.skip("wgmma is of compute capability 9.0")
    e = max(fmt.block_elems, 32)
    sizes = [
        (9, 24, e),
        (33, 200, 3 * e),
        (40, 4000, 3072),
        (64, 1000, 2048),
        (100, 4096, 2048 + e),
        (128, 333, 1536),
    ]
    sizes += [
        (130, 12, 4096),
        (200, 4200, 768),
        (256, 2048, 2048),
        (600, 4224, 1024 + e),
        (2100, 2120, 512),
        (17, 1001, 4096),
        (32, 4096, 2048),
        (280, 4096, 2048),
    ]
    for (m, n, k), dtype in itertools.product(sizes, (torch.float16, torch.bfloat16)):
        w, weights = random_weights(fmt, n, k, "cuda")
        x = random_x(m, k, dtype=dtype, device="cuda")
        packed = ops.pack(w, fmt.type_id)
        y = ops.gemm_packed(x, packed, fmt.type_id, n, k, None, "wgmma")
        assert_accurate(y, x, weights)
        again = ops.gemm_packed(x, packed, fmt.type_id, n, k, None, "wgmma")
        assert torch.equal(y, again)


def last_place(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A unit in the last place of each float64, as a number of that dtype."""
    info = torch.finfo(dtype)
    binade = (x / torch.frexp(x).mantissa).nan_to_num(0.0) / 2  # 0/0 where x is zero
    return binade.clamp(min=info.smallest_normal) * info.eps


def test_last_place() -> None:
    values = [1.0, -1.0, 1.999, 0.25, 2.0**-14, -(2.0**-20), 0.0]
    x = torch.tensor(values, dtype=torch.float64)
    exponents = torch.tensor([0, 0, 0, -2, -14, -14, -14], dtype=torch.float64)
    assert torch.equal(last_place(x, torch.float16), (exponents - 10).exp2())
    assert last_place(x[4:6], torch.bfloat16).tolist() == [2.0**-21, 2.0**-27]


# Rows of w, and tokens whose tile has just these: many rows are one wave of blocks with the largest
# tile, and two with smaller ones.
TILES = [(200, 32), (200, 64), (12800, 128), (12800, 256)]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@by_name
def test_wgmma_rounds_weights_once(fmt: Format, dtype: torch.dtype) -> None:
    """Rows of x that pick a column each have its weights as they are multiplied: half a unit in the
    last place off, or 0.504 where the scale is in two parts."""
    if "wgmma" not in algos("cuda", dtype):
        pytest.skip("wgmma is of compute capability 9.0")
    k = 512
    for n, tiles in itertools.groupby(TILES, lambda tile: tile[0]):
        w, weights = random_weights(fmt, n, k, "cuda")
        packed = ops.pack(w, fmt.type_id)
        want = weights.T
        bound = 0.505 * last_place(want, dtype)
        if fmt.type_id in WITH_OFFSETS:  # float32 rounds what they begin at, some 128 scales
            largest = weights.view(n, -1, fmt.block_elems).abs().amax(2)
            bound += 2.0**-17 * largest.repeat_interleave(fmt.block_elems, 1).T
        for _, m in tiles:
            product = partial(ops.gemm_packed, packed=packed, qtype=fmt.type_id, n=n, k=k)
            columns = torch.eye(k, dtype=dtype, device="cuda").split(m)
            picked = torch.cat([product(x, algo="wgmma") for x in columns])
            assert picked.dtype == dtype
            assert_near(picked, want, bound)


@pytest.mark.cuda
@pytest.mark.parametrize(("n", "m"), TILES)
def test_tile_that_rounds_weights_once(n: int, m: int) -> None:
    if "wgmma" not in algos("cuda", torch.bfloat16):
        pytest.skip("wgmma is of compute capability 9.0")
    packed = ops.pack(random_weights(FORMATS[QType.Q4_0], n, 512, "cuda")[0], QType.Q4_0)
    x = torch.zeros(m, 512, dtype=torch.bfloat16, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        ops.gemm_packed(x, packed, QType.Q4_0, n, 512, None, "wgmma")
        torch.cuda.synchronize()
    names = [e.key for e in found.key_averages() if "wgmma_kernel" in e.key]
    assert len(names) == 1 and f", {m}, false>" in names[0], names


@pytest.mark.cuda
def test_wgmma_keeps_float32() -> None:
    fmt = FORMATS[QType.Q4_0]
    packed = ops.pack(random_weights(fmt, 64, 64, "cuda")[0], fmt.type_id)
    with pytest.raises(NotImplementedError, match="these can: auto, gemv, mma"):
        ops.gemm_packed(torch.zeros(9, 64, device="cuda"), packed, 2, 64, 64, None, "wgmma")


@on_devices
def test_views_and_empty_sizes(device: str) -> None:
    fmt = FORMATS[QType.Q5_K]
    w, weights = random_weights(fmt, 96, 512, device)
    packed = ops.pack(w, fmt.type_id)
    assert torch.equal(ops.pack(w.t().contiguous().t(), fmt.type_id), packed)
    shifted = torch.empty(packed.numel() + 3, dtype=torch.uint8, device=device)[3:].view_as(packed)
    shifted.copy_(packed)
    x = random_x(3, 2, 1024, dtype=torch.float32, device=device)[..., ::2]
    y = ops.gemm_packed(x, shifted, fmt.type_id, 96, 512)
    assert y.shape == (3, 2, 96)
    assert_accurate(y.flatten(0, 1), x.flatten(0, 1), weights)
    empty = ops.pack(w[:0], fmt.type_id)
    assert empty.shape[0] == 0 and ops.unpack(empty, fmt.type_id, 0, 512).shape == w[:0].shape
    assert ops.gemm_packed(x, empty, fmt.type_id, 0, 512).shape == (3, 2, 0)
    narrow = ops.pack(w[:, :0], fmt.type_id)
    bias = random_x(96, dtype=torch.float32, device=device)
    assert_same(ops.gemm_packed(x[..., :0], narrow, fmt.type_id, 96, 0, bias)[0, 0], bias)


@on_devices
def test_gradients(device: str) -> None:
    fmt = FORMATS[QType.Q4_0]
    w, weights = random_weights(fmt, 40, 96, device)
    packed = ops.pack(w, fmt.type_id)
    x = random_x(5, 96, dtype=torch.float32, device=device).requires_grad_()
    bias = random_x(40, dtype=torch.float32, device=device).requires_grad_()
    grad = random_x(5, 40, dtype=torch.float32, device=device, seed=9)
    ops.gemm_packed(x, packed, fmt.type_id, 40, 96, bias).backward(grad)
    assert x.grad is not None and bias.grad is not None
    assert torch.allclose(x.grad.double(), grad.double() @ weights, rtol=1e-5, atol=1e-5)
    assert torch.allclose(bias.grad, grad.sum(0), rtol=1e-5, atol=1e-5)


@on_devices
def test_gradients_through_the_norm(device: str) -> None:
    w, weights = random_weights(FORMATS[QType.Q4_0], 40, 96, device)
    packed = ops.pack(w, 2)
    x, weight, y_grad = (
        random_x(*shape, dtype=torch.float32, device=device, seed=seed)
        for seed, shape in enumerate([(5, 96), (96,), (5, 40)])
    )
    found = []
    for wide in (False, True):
        a, b = (t.double() if wide else t.clone() for t in (x, weight))
        a.requires_grad_(), b.requires_grad_()
        if wide:
            even = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-3)
            y = (b * even) @ weights.T
        else:
            y = ops.gemm_packed(a, packed, 2, 40, 96, norm_weight=b, norm_eps=1e-3)
        y.backward(y_grad.to(y.dtype))
        found.append((a.grad, b.grad))
    for got, want in zip(*found, strict=True):
        assert got is not None and want is not None
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="gemm_packed_gated has no gradient"):
        ops.gemm_packed_gated(
            x, packed, packed, 2, 40, 96, "auto", weight.clone().requires_grad_(), 0.0
        )


def test_autocast() -> None:
    packed = ops.pack(random_weights(FORMATS[QType.Q4_0], 40, 96, "cpu")[0], 2)
    x, bias = torch.randn(2, 96), torch.randn(40)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.gemm_packed(x, packed, 2, 40, 96, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.gemm_packed(x.bfloat16(), packed, 2, 40, 96, bias.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.gemm_packed(x, packed, 2, 40, 96, norm_weight=x[0], norm_eps=1.0)
    x = x.bfloat16()
    assert torch.equal(y, ops.gemm_packed(ops.rms_norm(x, x[0], 1.0), packed, 2, 40, 96))


def test_errors_name_the_argument() -> None:
    w = torch.zeros(3, 36, dtype=torch.uint8)
    packed, x = ops.pack(w, 2), torch.zeros(2, 64)
    cases = [
        (NotImplementedError, r"IQ2_XXS has no packed form; types that have one: Q4_0, .*NVFP4",
         lambda: ops.pack(torch.zeros(1, 66, dtype=torch.uint8), QType.IQ2_XXS)),
        (NotImplementedError, "qtype: F32 has no packed form", lambda: ops.pack(w, 0)),
        (ValueError, "w: row of 36 bytes is not a multiple of the 34-byte Q8_0 block",
         lambda: ops.pack(w, 8)),
        (TypeError, "w: expected torch.uint8", lambda: ops.pack(w.float(), 2)),
        (ValueError, r"packed: expected shape \[4, 1088\] for Q8_0 weights \[3, 64\], got \[4, 5",
         lambda: ops.unpack(packed, 8, 3, 64)),
        (ValueError, r"packed: expected shape \[8, 576\]", lambda: ops.unpack(packed, 2, 65, 64)),
        (ValueError, "k: 33 is not a multiple of the 32", lambda: ops.unpack(packed, 2, 3, 33)),
        (ValueError, "n: expected at least 0", lambda: ops.unpack(packed, 2, -1, 64)),
        (ValueError, "x: expected rows of 64 values, got shape",
         lambda: ops.gemm_packed(x[:, :32], packed, 2, 3, 64)),
        (TypeError, "x: expected torch.float32, torch.float16",
         lambda: ops.gemm_packed(x.double(), packed, 2, 3, 64)),
        (TypeError, "bias: expected torch.float32 as x, got torch.float16",
         lambda: ops.gemm_packed(x, packed, 2, 3, 64, torch.zeros(3).half())),
        (ValueError, r"bias: expected shape \[3\]",
         lambda: ops.gemm_packed(x, packed, 2, 3, 64, torch.zeros(4))),
        (ValueError, r"residual: expected shape \[2, 3\], got \[3\]",
         lambda: ops.gemm_packed(x, packed, 2, 3, 64, None, "auto", torch.zeros(3))),
        (TypeError, "residual: expected torch.float32 as x, got torch.float16",
         lambda: ops.gemm_packed(x, packed, 2, 3, 64, None, "auto", torch.zeros(2, 3).half())),
        (ValueError, r"norm_weight: expected shape \[64\], got \[3\]",
         lambda: ops.gemm_packed(x, packed, 2, 3, 64, norm_weight=torch.zeros(3))),
        (TypeError, "norm_weight: expected torch.float32 as x, got torch.float16",
         lambda: ops.gemm_packed_gated(
             x, packed, packed, 2, 3, 64, "auto", torch.zeros(64).half())),
        (ValueError, r"up: expected shape \[4, 576\]",
         lambda: ops.gemm_packed_gated(x, packed, packed[:2], 2, 3, 64)),
        (ValueError, r"gate: expected shape \[4, 576\]",
         lambda: ops.gemm_packed_gated(x, packed[:2], packed, 2, 3, 64)),
        (NotImplementedError, "the CPU has no tensor cores",
         lambda: ops.gemm_packed(x, packed, 2, 3, 64, None, "gemv")),
        (NotImplementedError, "wgmma cannot serve this product: .*; these can: auto$",
         lambda: ops.gemm_packed(x, packed, 2, 3, 64, None, "wgmma")),
        (ValueError, "algo: expected one of auto, auto_int8, gemv, few, mma, wgmma, int8, got 'fas",
         lambda: ops.gemm_packed(x, packed, 2, 3, 64, None, "fast")),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_every_other_type_says_so() -> None:
    for fmt in BLOCK_FORMATS:
        if fmt not in PACKED:
            blocks = torch.zeros(1, fmt.block_bytes, dtype=torch.uint8)
            with pytest.raises(NotImplementedError, match="no packed form"):
                ops.pack(blocks, fmt.type_id)
    assert format_by_id(2).name == "Q4_0"
