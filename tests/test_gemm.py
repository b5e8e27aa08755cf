# SPDX-License-Identifier: MIT
"""gemm, gemm_fp32 and embedding against float64: every rung that can serve, every type.

Rungs that keep activations may err twice as much as torch's own product in the same dtype, by the
largest error of each row. Rungs that round them to int8 are compared with the same integer
algorithm in float64 (`gemm_q8_reference`): what is left is the order of a float32 sum.
"""

from __future__ import annotations

import itertools
import re
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ALL_FORMATS, BLOCK_FORMATS, DEVICES, assert_same, random_blocks

from quantgemm import _C, ops
from quantgemm.formats import FORMATS, Format, QType, format_by_name
from quantgemm.reference import gemm_q8_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALGOS = ["naive", "tiled", "dp4a", "mma", "mma_q8"]
ROUNDING = {"dp4a", "mma_q8"}
PLAIN_NUMPY = {"F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "F16": "f2"}
on_devices = pytest.mark.parametrize("device", DEVICES)
by_name = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
blocks_by_name = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda f: f.name)


@cache
def pool_of(fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of random bits whose weights are of ordinary size, and those weights."""
    rng = np.random.default_rng(fmt.type_id)
    if fmt.is_plain:
        values = rng.standard_normal(4096).astype(np.float32)
        if fmt.name in PLAIN_NUMPY:
            scale = 40 if fmt.name.startswith("I") else 1
            values = np.round(values * scale, 3).astype(PLAIN_NUMPY[fmt.name])
        elif fmt.name == "BF16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        blocks = values.view(np.uint8).reshape(4096, -1)
    else:
        blocks = random_blocks(fmt, 8192, fmt.block_elems, seed=5)
    decoded = fmt.decode(blocks)
    with np.errstate(invalid="ignore"):
        largest = np.abs(decoded).max(1)  # NaN compares false
        good = (largest > 1e-3) & (largest < 4) | fmt.is_plain
    assert good.sum() >= 64, f"{fmt.name}: {good.sum()} blocks of ordinary size"
    return torch.from_numpy(blocks[good].copy()), torch.from_numpy(decoded[good].copy())


def random_weights(
    fmt: Format, n: int, k: int, device: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [n, row_bytes], and float64 [n, k]"""
    blocks, decoded = pool_of(fmt)
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, len(blocks), (n, k // fmt.block_elems), generator=generator)
    w = blocks[pick].reshape(n, fmt.row_bytes(k))
    return w.to(device), decoded[pick].reshape(n, k).double().to(device)


def random_x(*shape: int, dtype: torch.dtype, device: str, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def architecture(device: str) -> int:
    if device == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def able(m: int, n: int, k: int, qtype: int, dtype: torch.dtype, device: str) -> list[str]:
    """The rungs that can serve a product."""
    name = str(dtype).removeprefix("torch.")
    row = _C.select_gemm(m, n, k, qtype, name, architecture(device), False)
    return [algo for algo, obstacle in row["obstacles"].items() if obstacle is None]


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: torch.Tensor) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).abs()
    ok = error <= tolerance  # false for NaN
    assert ok.all(), f"{(~ok).sum()} of {ok.numel()} beyond: {error[~ok][0]}, {tolerance[~ok][0]}"


def one_rounding(y: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place of y's dtype."""
    info = torch.finfo(y.dtype)
    return want.abs() * info.eps / 2 * 1.01 + info.smallest_normal * info.eps


def assert_as_torch(y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, algo: str) -> None:
    """A float32 sum rounded once; and at most twice torch's error in the same dtype by row maximum.

    Tensor cores may take weights rounded to x's dtype or, with few tokens, their exact codes: y is
    then between the two products. What is said about torch holds for rows that are long enough: the
    error of a few numbers may be anything down to zero. Even the largest of some hundred may be
    half of what one rounding allows, so that rounding comes on top.
    """
    assert y.dtype == x.dtype
    want = x.double() @ weights.T
    loose = 1e-6 * (x.double().abs() @ weights.abs().T) + 1e-12
    apart = x.double() @ (weights.to(x.dtype).double() - weights).T
    before = loose + (apart.abs() if algo == "mma" else 0)  # y is rounded
    assert_near(y, want, before + one_rounding(y, want.abs() + before))
    if y.shape[-1] >= 32 and y.numel():
        own = (x @ weights.to(x.dtype).T).double() - want
        assert_near(y, want, 2 * own.abs().amax(1, keepdim=True) + loose + one_rounding(y, want))


def assert_as_integers(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, qtype: int) -> None:
    """The integer algorithm up to the order of its float32 sum, then one rounding to y's dtype."""
    assert y.dtype == x.dtype
    want, terms = gemm_q8_reference(x, w, qtype)
    assert_near(y, want, 1e-5 * terms + one_rounding(y, want))


def nmse(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.double() - want).square().sum() / want.square().sum())


# All values and most pairs of m, n and blocks along k (0: 4096 weights). On a GPU all combinations.
SIZES = (0, 1, 2, 7, 33, 128), (1, 8, 33, 257), (1, 3, 0)
COVERING = [
    (0, 33, 1), (1, 1, 1), (1, 257, 0), (2, 8, 3), (2, 33, 0), (7, 33, 3), (7, 257, 1), (7, 1, 0),
    (33, 8, 0), (33, 257, 3), (33, 33, 1), (128, 1, 3), (128, 257, 1), (128, 8, 0),
]  # fmt: skip


def cases(fmt: Format, device: str) -> list[tuple[int, int, int, torch.dtype]]:
    if device == "cuda":
        return list(itertools.product(*SIZES, DTYPES))
    return [(*size, DTYPES[(i + fmt.type_id) % 3]) for i, size in enumerate(COVERING)]


@on_devices
@by_name
def test_every_rung(fmt: Format, device: str) -> None:
    seen = set()
    for m, n, blocks, dtype in cases(fmt, device):
        k = blocks * fmt.block_elems or 4096
        w, weights = random_weights(fmt, n, k, device)
        x = random_x(m, k, dtype=dtype, device=device)
        for algo in able(m, n, k, fmt.type_id, dtype, device):
            y = ops.gemm(x, w, fmt.type_id, algo)
            if algo in ROUNDING:
                assert_as_integers(y, x, w, fmt.type_id)
            else:
                assert_as_torch(y, x, weights, algo)
            seen.add(algo)
    assert seen >= {"naive", "tiled"} | (set() if fmt.is_plain else {"dp4a"})


@pytest.mark.cuda
@pytest.mark.parametrize("m", [12, 20, 64, 257, 380, 500])
@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q4_K, QType.Q6_K, QType.Q8_0, QType.MXFP4])
def test_tiles_of_many_tokens(qtype: QType, m: int) -> None:
    """The tiles and passes between and beyond the sizes above; more tiles than multiprocessors."""
    fmt = FORMATS[qtype]
    for n, k in ((130, 768), (5000, 256)):
        w, weights = random_weights(fmt, n, k, "cuda")
        for dtype in DTYPES:
            x = random_x(m, k, dtype=dtype, device="cuda")
            for algo in able(m, n, k, qtype, dtype, "cuda"):
                y = ops.gemm(x, w, qtype, algo)
                if algo in ROUNDING:
                    assert_as_integers(y, x, w, qtype)
                else:
                    assert_as_torch(y, x, weights, algo)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "qtype", [QType.Q4_0, QType.Q4_K, QType.Q5_1, QType.Q8_0, QType.IQ4_XS, QType.MXFP4]
)
def test_integers_for_a_thousand_tokens(qtype: QType, dtype: torch.dtype) -> None:
    """Weights as fragments: 192 tokens × 128 rows, cut along k, the last part empty."""
    for m, n, k in ((1213, 4000, 4352), (1090, 4101, 4096)):
        if "mma_q8" not in able(m, n, k, qtype, dtype, "cuda"):
            pytest.skip("no tensor cores")
        w, _ = random_weights(FORMATS[qtype], n, k, "cuda")
        x = random_x(m, k, dtype=dtype, device="cuda")
        first = ops.gemm(x, w, qtype, "mma_q8")
        assert_as_integers(first, x, w, qtype)
        assert_same(first, ops.gemm(x, w, qtype, "mma_q8"))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q4_K, QType.Q8_0])
def test_several_tiles_for_each_multiprocessor(qtype: QType, dtype: torch.dtype) -> None:
    """Tiles of 256 tokens × 128 rows: whole ones one after the other, and ones cut along k."""
    count = torch.cuda.get_device_properties("cuda").multi_processor_count
    if "mma" not in able(1024, 128, 512, qtype, dtype, "cuda"):
        pytest.skip("no tensor cores")
    for m, n, k in (
        (1024, 128 * count, 512),
        (1024, 128 * count - 5, 768),
        (1000, 48 * count, 1280),
    ):
        w, weights = random_weights(FORMATS[qtype], n, k, "cuda")
        x = random_x(m, k, dtype=dtype, device="cuda")
        assert_as_torch(ops.gemm(x, w, qtype, "mma"), x, weights, "mma")


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_unquantised_rows_of_any_length(dtype: torch.dtype, device: str) -> None:
    """k need not be a multiple of anything; rows then start off 16-byte boundaries."""
    for name, k in itertools.product(("F32", "BF16", "I8"), (5, 31, 1003)):
        fmt = format_by_name(name)
        w, weights = random_weights(fmt, 37, k, device)
        for m, algo in itertools.product((1, 40), ("naive", "tiled")):
            x = random_x(m, k, dtype=dtype, device=device)
            assert_as_torch(ops.gemm(x, w, fmt.type_id, algo), x, weights, algo)


@on_devices
@pytest.mark.parametrize("algo", ["auto", "auto_q8", *ALGOS])
def test_layouts_of_x_and_w(algo: str, device: str) -> None:
    """Strides, leading dimensions and odd addresses change nothing, to the last bit."""
    fmt, k, dtype = FORMATS[QType.Q4_K], 512, torch.float16
    if algo in ALGOS and algo not in able(6, 20, k, fmt.type_id, dtype, device):
        pytest.skip(f"{algo} cannot serve on {device}")
    w, _ = random_weights(fmt, 20, k, device)
    x = random_x(6, k, dtype=dtype, device=device)
    want = ops.gemm(x, w, fmt.type_id, algo)
    assert_same(ops.gemm(x.view(2, 3, k), w, fmt.type_id, algo), want.view(2, 3, 20))
    assert_same(ops.gemm(x[0], w, fmt.type_id, algo), ops.gemm(x[:1], w, fmt.type_id, algo)[0])
    wide = torch.stack([x, x + 1], -1).flatten(1)  # every other column
    assert_same(ops.gemm(wide[:, ::2], w, fmt.type_id, algo), want)
    assert_same(ops.gemm(x.T.contiguous().T, w, fmt.type_id, algo), want)
    assert_same(ops.gemm(x, w.repeat_interleave(2, 0)[::2], fmt.type_id, algo), want)
    for tensor, is_x in ((x, True), (w, False)):
        storage = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=device)
        odd = storage[1:].view(tensor.shape)
        odd.copy_(tensor)
        assert_same(ops.gemm(odd if is_x else x, w if is_x else odd, fmt.type_id, algo), want)


@on_devices
def test_does_not_touch_its_inputs(device: str) -> None:
    w, _ = random_weights(FORMATS[QType.Q6_K], 33, 512, device)
    x = random_x(9, 512, dtype=torch.bfloat16, device=device)
    before = x.clone(), w.clone()
    for algo in able(9, 33, 512, QType.Q6_K, x.dtype, device):
        ops.gemm(x, w, QType.Q6_K, algo)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])


@on_devices
def test_empty_products(device: str) -> None:
    w, _ = random_weights(FORMATS[QType.Q4_0], 5, 64, device)
    x = torch.ones(3, 64, device=device)
    for algo in ("auto", "auto_q8", *able(3, 5, 64, QType.Q4_0, x.dtype, device)):
        assert ops.gemm(x[:0], w, QType.Q4_0, algo).shape == (0, 5)
        assert ops.gemm(x, w[:0], QType.Q4_0, algo).shape == (3, 0)
        assert ops.gemm(x.view(3, 1, 64)[:, :0], w, QType.Q4_0, algo).shape == (3, 0, 5)
        y = ops.gemm(x[:, :0], w[:, :0], QType.Q4_0, algo)
        assert y.shape == (3, 5) and not y.any()
    for algo in ("naive", "tiled"):
        assert not ops.gemm_fp32(x[:, :0], torch.ones(5, 0, device=device), algo).any()
        assert ops.gemm_fp32(x[:0], torch.ones(5, 64, device=device), algo).shape == (0, 5)


# ---- float32 times float32 ----
@on_devices
@pytest.mark.parametrize("algo", ["naive", "tiled"])
def test_gemm_fp32(algo: str, device: str) -> None:
    every = itertools.product(*SIZES[:2], (1, 3, 31, 256, 4096)) if device == "cuda" else ()
    for m, n, k in every or [(m, n, (k or 31) * 8 - 1) for m, n, k in COVERING]:
        x = random_x(m, k, dtype=torch.float32, device=device)
        w = random_x(n, k, dtype=torch.float32, device=device, seed=2)
        assert_as_torch(ops.gemm_fp32(x, w, algo), x, w.double(), algo)
    w = random_x(64, 96, dtype=torch.float32, device=device).T
    x = random_x(4, 5, 64, dtype=torch.float32, device=device)
    got = ops.gemm_fp32(x, w, algo)
    assert got.shape == (4, 5, 96)
    assert_as_torch(got.flatten(0, 1), x.flatten(0, 1), w.double(), "naive")


# ---- upper bounds of the normalised mean square error ----
@on_devices
@pytest.mark.parametrize("algo", ["naive", "tiled"])
def test_error_of_float32(algo: str, device: str) -> None:
    k = 4096
    x = random_x(40, k, dtype=torch.float32, device=device)
    w = random_x(96, k, dtype=torch.float32, device=device, seed=2)
    assert nmse(ops.gemm_fp32(x, w, algo), x.double() @ w.double().T) < 1e-13


@on_devices
@pytest.mark.parametrize("algo", ["naive", "tiled"])
@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q4_K, QType.Q6_K, QType.Q8_0])
def test_error_of_w4a16(qtype: QType, algo: str, device: str) -> None:
    k = 4096
    w = ops.quantize(random_x(96, k, dtype=torch.float32, device=device, seed=2), qtype)
    x = random_x(40, k, dtype=torch.float32, device=device)
    want = x.double() @ ops.dequantize(w, qtype).double().T
    assert nmse(ops.gemm(x, w, qtype, algo), want) < 1e-13


@on_devices
@pytest.mark.parametrize("algo", sorted(ROUNDING))
@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q4_1, QType.Q4_K, QType.Q6_K, QType.Q8_0])
def test_error_of_w4a8(qtype: QType, algo: str, device: str) -> None:
    """Eight groups: the error of a float32 sum grows with their number."""
    if algo not in able(40, 96, 256, qtype, torch.float32, device):
        pytest.skip(f"{algo} cannot serve on {device}")
    w = ops.quantize(random_x(96, 256, dtype=torch.float32, device=device, seed=2), qtype)
    x = random_x(40, 256, dtype=torch.float32, device=device)
    # Products with codes and with offsets nearly cancel: what is left is small beside its terms.
    bound = 3e-14 if FORMATS[qtype].has_offset else 1e-14
    assert nmse(ops.gemm(x, w, qtype, algo), gemm_q8_reference(x, w, qtype)[0]) < bound


@on_devices
def test_error_of_quantisation_itself(device: str) -> None:
    """For scale; a normal distribution has longer tails beside its blocks' largest weights."""
    normal = random_x(256, 4096, dtype=torch.float32, device=device)
    uniform = torch.special.ndtr(normal) - 0.5
    for weights, low, high in ((uniform, 3e-3, 5e-3), (normal, 6e-3, 9e-3)):
        back = ops.dequantize(ops.quantize(weights, QType.Q4_0), QType.Q4_0)
        assert low < nmse(back, weights.double()) < high


# ---- the compensation term ----
def product_without_compensation(x: torch.Tensor, w: torch.Tensor, fmt: Format) -> torch.Tensor:
    """W4A8 with the codes as stored, unsigned, and the sum of the activations forgotten."""
    blocks = w.cpu().numpy().reshape(-1, fmt.block_bytes)
    codes = fmt.codes(blocks).astype(np.float64).reshape(-1, fmt.group)
    if not fmt.has_offset:
        codes += 8  # stored as 0…15: this is what − 8 · s_a undoes
    forgetful = torch.from_numpy(codes * fmt.scales(blocks).reshape(-1, 1)).reshape(len(w), -1)
    rows = ops.quantize_activations(x).cpu()
    k = x.shape[-1]
    scales = rows[:, k : k + k // 4].contiguous().view(torch.float32)[:, ::2].double()
    quantised = rows[:, :k].view(torch.int8).double() * scales.repeat_interleave(32, 1)
    return (quantised @ forgetful.T).to(x.device)


@on_devices
@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q4_1, QType.Q4_K, QType.Q5_K])
def test_forgetting_the_sum_of_activations_is_seen(qtype: QType, device: str) -> None:
    """Weights are codes minus something; with activations of mean 1 that is most of the sum."""
    w = ops.quantize(random_x(64, 2048, dtype=torch.float32, device=device), qtype)
    x = random_x(16, 2048, dtype=torch.float32, device=device, seed=2) + 1
    want = x.double() @ ops.dequantize(w, qtype).double().T
    fmt = FORMATS[qtype]
    assert nmse(product_without_compensation(x, w, fmt), want) > 3**2  # several hundred per cent
    for algo in ROUNDING & set(able(16, 64, 2048, qtype, x.dtype, device)):
        error = nmse(ops.gemm(x, w, qtype, algo), want) ** 0.5
        assert error < 0.02, f"{algo}: {error:.0%} is more than int8 activations explain"


# ---- NaN and infinity ----
@on_devices
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, 40])
def test_special_values_reach_their_row_alone(
    m: int, dtype: torch.dtype, value: float, device: str
) -> None:
    """Every output of the token, as IEEE says where x is kept; no output of another token."""
    qtype, n, k = QType.Q4_0, 50, 512
    w, weights = random_weights(FORMATS[qtype], n, k, device)
    clean = random_x(m, k, dtype=dtype, device=device)
    x = clean.clone()
    x[2, 77] = value
    for algo in able(m, n, k, qtype, dtype, device):
        y, y_clean = ops.gemm(x, w, qtype, algo), ops.gemm(clean, w, qtype, algo)
        others = torch.arange(m, device=device) != 2
        assert_same(y[others], y_clean[others])
        if algo in ROUNDING:
            assert not y[2].isfinite().any(), algo
        else:
            assert_same(y[2], (weights[:, 77] * value).to(dtype))  # NaN where a weight is 0


@on_devices
def test_special_scales_reach_their_column_alone(device: str) -> None:
    """A NaN scale in one row of w spoils that output, of every token."""
    qtype, k = QType.Q8_0, 256
    w, _ = random_weights(FORMATS[qtype], 40, k, device)
    spoiled = w.clone()
    spoiled[7, 34 * 3 : 34 * 3 + 2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
    others = torch.arange(40, device=device) != 7
    for m in (2, 40):
        x = random_x(m, k, dtype=torch.bfloat16, device=device)
        for algo in able(m, 40, k, qtype, x.dtype, device):
            y = ops.gemm(x, spoiled, qtype, algo)
            assert y[:, 7].isnan().all(), algo
            assert_same(y[:, others], ops.gemm(x, w, qtype, algo)[:, others])


# ---- mistakes ----
def bytes_of(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


X, W = torch.zeros(2, 32), bytes_of(4, 18)
GEMM_MISTAKES = [
    ((X.double(), W, 2), TypeError,
     "x: expected torch.float32, torch.float16 or torch.bfloat16, got torch.float64"),
    ((X.int(), W, 2), TypeError, "x: expected torch.float32"),
    ((X, W.float(), 2), TypeError, "w: expected torch.uint8, got torch.float32"),
    ((X, W, 4), ValueError, "qtype: 4 is not a GGUF type"),
    ((X[0, 0], W, 2), ValueError, "x: expected at least one dimension [..., k], got a scalar"),
    ((X, W[0], 2), ValueError, "w: expected two dimensions [n, row], got shape [18]"),
    ((X, bytes_of(4, 35), 2), ValueError,
     "w: row of 35 bytes is not a multiple of the 18-byte Q4_0 block"),
    ((torch.zeros(2, 64), W, 2), ValueError,
     "x: expected rows of 32 values as w's rows of 18 bytes of Q4_0, got shape [2, 64]"),
    ((X, W, 2, "fast"), ValueError,
     "algo: expected one of auto, auto_q8, naive, tiled, dp4a, mma, mma_q8, got 'fast'"),
    ((X, bytes_of(4, 128), 0, "dp4a"), NotImplementedError,
     "algo: dp4a cannot serve this product: integer products need quantised weights; "
     "these can: naive, tiled"),
    ((X, bytes_of(4, 64), 1, "mma_q8"), NotImplementedError, "these can: naive, tiled"),
    ((X, W, 2, "mma"), NotImplementedError, "algo: mma cannot serve this product: "),
]  # fmt: skip
FP32_MISTAKES = [
    ((X.half(), X, "naive"), TypeError, "x: expected torch.float32, got torch.float16"),
    ((X, X.half(), "naive"), TypeError, "w: expected torch.float32, got torch.float16"),
    ((X, X, "dp4a"), ValueError, "algo: expected naive or tiled, got 'dp4a'"),
    ((X, torch.zeros(4, 31), "tiled"), ValueError,
     "x: expected rows of 31 values as w's, got shape [2, 32]"),
    ((X, X[0], "tiled"), ValueError, "w: expected two dimensions [n, row], got shape [32]"),
]  # fmt: skip
IDS = torch.zeros(3, dtype=torch.int64)
EMBEDDING_MISTAKES = [
    ((IDS.float(), W, 2), TypeError,
     "ids: expected torch.int64 or torch.int32, got torch.float32"),
    ((IDS, W.float(), 2), TypeError, "w: expected torch.uint8, got torch.float32"),
    ((IDS, W[0], 2), ValueError, "w: expected two dimensions [rows, row_bytes], got shape [18]"),
    ((IDS, bytes_of(4, 35), 2), ValueError,
     "w: row of 35 bytes is not a multiple of the 18-byte Q4_0 block"),
    ((IDS, W, 4), ValueError, "qtype: 4 is not a GGUF type"),
    ((IDS, W, 2, torch.int8), TypeError, "dtype: expected torch.float32, torch.float16 or"),
]  # fmt: skip


@on_devices
@pytest.mark.parametrize(
    ("op", "args", "error", "text"),
    [
        (op, *row)
        for op, rows in (
            (ops.gemm, GEMM_MISTAKES),
            (ops.gemm_fp32, FP32_MISTAKES),
            (ops.embedding, EMBEDDING_MISTAKES),
        )
        for row in rows
    ],
)
def test_mistakes_are_named(op, args: tuple, error: type, text: str, device: str) -> None:
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
    with pytest.raises(error, match=re.escape(text)):
        op(*args)


def test_the_cpu_has_no_tensor_cores() -> None:
    for algo in ("mma", "mma_q8"):
        text = f"algo: {algo} cannot serve this product: the CPU has no tensor cores; these can: "
        with pytest.raises(NotImplementedError, match=re.escape(text + "naive, tiled, dp4a")):
            ops.gemm(X, W, QType.Q4_0, algo)


@pytest.mark.cuda
def test_tensors_on_two_devices() -> None:
    with pytest.raises(ValueError, match="w: expected on cuda:0 as x is, got cpu"):
        ops.gemm(X.cuda(), W, QType.Q4_0)
    with pytest.raises(ValueError, match="w: expected on cpu as x is, got cuda:0"):
        ops.gemm_fp32(X, X.cuda(), "tiled")
    with pytest.raises(ValueError, match="w: expected on cuda:0 as ids are, got cpu"):
        ops.embedding(IDS.cuda(), W, QType.Q4_0)


# ---- the choice, which needs no GPU ----
PROBLEMS = list(
    itertools.product(
        (0, 1, 8, 9, 64, 4096), ALL_FORMATS, ("float32", "float16", "bfloat16"), (0, 75, 80, 90)
    )
)


def test_choices() -> None:
    for m, fmt, dtype, arch in PROBLEMS:
        for may_round in (False, True):
            row = _C.select_gemm(m, 4096, 4096, fmt.type_id, dtype, arch, may_round)
            assert list(row["obstacles"]) == ALGOS and row["reason"]
            can = {algo for algo, obstacle in row["obstacles"].items() if obstacle is None}
            assert row["algo"] in can >= {"naive", "tiled"}
            assert may_round or row["algo"] not in ROUNDING, "auto never rounds activations"
            assert not fmt.is_plain or can == {"naive", "tiled"}
            assert fmt.is_plain or "dp4a" in can
            assert arch >= 80 or not can & {"mma", "mma_q8"}
            assert dtype != "float32" or "mma" not in can, "tensor cores would round float32"
            if arch >= 80 and not fmt.is_plain:
                assert "mma_q8" in can and ("mma" in can) == (dtype != "float32")


@pytest.mark.parametrize(
    ("m", "qtype", "dtype", "arch", "auto", "auto_q8"),
    [
        (1, QType.Q4_0, "float32", 0, "tiled", "dp4a"),
        (512, QType.Q4_K, "bfloat16", 0, "tiled", "dp4a"),
        (1, QType.F32, "float32", 0, "tiled", "tiled"),
        (1, QType.Q4_0, "bfloat16", 75, "tiled", "dp4a"),
        (1, QType.Q4_0, "float32", 90, "tiled", "dp4a"),
        (512, QType.Q4_0, "bfloat16", 80, "mma", None),
        (512, QType.Q4_0, "float32", 80, "tiled", None),
        (512, QType.BF16, "bfloat16", 90, "tiled", "tiled"),
    ],
)
def test_known_choices(
    m: int, qtype: QType, dtype: str, arch: int, auto: str, auto_q8: str | None
) -> None:
    """None: whatever is fastest there."""
    for may_round, want in ((False, auto), (True, auto_q8)):
        got = _C.select_gemm(m, 4096, 4096, qtype, dtype, arch, may_round)["algo"]
        assert got == want or want is None


def test_choice_of_an_unknown_type() -> None:
    with pytest.raises(ValueError, match="qtype: 4 is not a GGUF type"):
        _C.select_gemm(1, 1, 32, 4, "float32", 0, False)


# ---- embedding ----
@on_devices
@by_name
def test_embedding_is_rows_of_dequantize(fmt: Format, device: str) -> None:
    """Equal bits; any bytes; rows of any length, which start at any multiple of their bytes."""
    for num_blocks in (1, 3, 40, 300):
        w = torch.from_numpy(random_blocks(fmt, 19, num_blocks * fmt.block_elems)).to(device)
        ids = torch.tensor([[3, 0, 18], [3, 17, 4]], device=device)
        for dtype in DTYPES:
            want = ops.dequantize(w, fmt.type_id, dtype)[ids]
            assert_same(ops.embedding(ids, w, fmt.type_id, dtype), want)
        assert_same(ops.embedding(ids.int(), w, fmt.type_id, torch.bfloat16), want)


@on_devices
def test_embedding_shapes(device: str) -> None:
    w, _ = random_weights(FORMATS[QType.Q4_K], 10, 512, device)
    table = ops.dequantize(w, QType.Q4_K)
    one = torch.tensor(4, device=device)
    assert_same(ops.embedding(one, w, QType.Q4_K), table[4])
    ids = torch.arange(24, device=device).view(2, 3, 4) % 10
    assert_same(ops.embedding(ids, w, QType.Q4_K), table[ids])
    assert_same(ops.embedding(ids.mT, w, QType.Q4_K), table[ids.mT])
    assert_same(ops.embedding(ids, w.repeat_interleave(2, 0)[::2], QType.Q4_K), table[ids])
    assert ops.embedding(ids[:0], w, QType.Q4_K, torch.float16).shape == (0, 3, 4, 512)
    assert ops.embedding(ids, w[:, :0], QType.Q4_K).shape == (2, 3, 4, 0)


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_embedding_ids_outside_the_table(bad: int) -> None:
    w, _ = random_weights(FORMATS[QType.Q4_0], 10, 64, "cpu")
    text = f"ids: expected 0 to 9 for a table of 10 rows, got {bad}"
    with pytest.raises(IndexError, match=text):
        ops.embedding(torch.tensor([1, bad]), w, QType.Q4_0)


@pytest.mark.cuda
@by_name
def test_embedding_ids_outside_the_table_give_nan(fmt: Format) -> None:
    w, _ = random_weights(fmt, 10, 3 * fmt.block_elems, "cuda")
    ids = torch.tensor([1, -1, 10, 9, 2**40], device="cuda")
    for dtype in DTYPES:
        out = ops.embedding(ids, w, fmt.type_id, dtype)
        assert out[[1, 2, 4]].isnan().all()
        assert_same(out[[0, 3]], ops.dequantize(w, fmt.type_id, dtype)[[1, 9]])


@pytest.mark.cuda
@pytest.mark.slow
def test_offsets_beyond_2_to_the_31() -> None:
    """Rows of w, of x and of y that begin after 2^31 elements."""
    qtype, k = QType.Q4_0, 32
    tile, _ = random_weights(FORMATS[qtype], 1, k, "cuda")
    rows = 2**31 // 16 + 3
    w = tile.expand(rows, -1).contiguous()  # 2.4 GB
    last = torch.tensor([rows - 1], device="cuda")
    assert_same(ops.embedding(last, w, qtype), ops.dequantize(tile, qtype))
    x = random_x(17, k, dtype=torch.bfloat16, device="cuda")
    for algo in able(17, rows, k, qtype, x.dtype, "cuda"):
        y = ops.gemm(x, w, qtype, algo)  # 17 x rows > 2^31
        assert_same(y[:, -3:], ops.gemm(x, w[-3:], qtype, algo))
        del y
