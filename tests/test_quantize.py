# SPDX-License-Identifier: MIT
"""torch.ops.quantgemm.quantize. Types with a closed form: the bytes of ggml and of PyPI gguf. Types
whose scales are searched for: row errors of at most 1.002 × ggml's. CPU and CUDA: equal bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import BLOCK_FORMATS, DEVICES, SHARED
from ggml_search import decoded_by_ggml, stress_rows

from quantgemm import ops
from quantgemm.formats import FORMATS, Format, QType

SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
CLOSED_FORM = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q8_K",
               "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0"]  # fmt: skip
USE_IMPORTANCE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", *SEARCHED]
WRITABLE = [f for f in BLOCK_FORMATS if f.name in CLOSED_FORM + SEARCHED]

DENORMALS = 9  # the row of ggml's vectors whose codes are undefined: 1 / scale overflows

on_devices = pytest.mark.parametrize("device", DEVICES)
every_type = pytest.mark.parametrize("fmt", WRITABLE, ids=lambda f: f.name)
needs_vectors = pytest.mark.skipif(
    not SHARED.exists(), reason="ggml's vectors are not on this machine"
)


def types(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fmt", [FORMATS[QType[n]] for n in names], ids=lambda f: f.name)


def golden(fmt: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ggml's source rows, its bytes and what those decode to."""
    with np.load(SHARED / "golden" / f"{fmt.name.lower().replace('_k', '_K')}.npz") as z:
        kind = "chunk" if "q_chunk" in z.files else "ref"
        return z["src"], z[f"q_{kind}"], z[f"deq_{kind}"]


def quantize(
    x: np.ndarray, fmt: Format, importance: np.ndarray | None = None, device: str = "cpu"
) -> np.ndarray:
    weights = None if importance is None else torch.from_numpy(importance).to(device)
    return ops.quantize(torch.from_numpy(x).to(device), fmt.type_id, weights).cpu().numpy()


def rms(difference: np.ndarray) -> np.ndarray:
    """Per row, in float64."""
    return np.sqrt((difference.astype(np.float64) ** 2).mean(axis=1))


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def any_bits(*shape: int, seed: int = 0) -> np.ndarray:
    """Floats of any magnitude, NaN, infinities and denormals."""
    bits = np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)
    return bits.view(np.float32)


def awkward_rows(cols: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    x = gaussian(32, cols)
    scale = 2.0 ** rng.integers(-8, 8, (32, cols // 32)).repeat(32, axis=1)
    rows = {
        "gaussian": x,
        "heavy tails": rng.standard_t(2, x.shape),
        "constant": rng.standard_normal((32, cols // 256)).repeat(256, axis=1),
        "halves": rng.integers(-15, 16, x.shape) / 2 * scale,  # ties of four-bit codes
        "quarters": rng.integers(-254, 255, x.shape) / 2 * scale,  # ties of eight-bit codes
        "sparse": np.where(rng.random(x.shape) < 0.02, x, 0),
        "huge": x * 1e30,
        "tiny": x * 1e-30,
        "zero": np.zeros_like(x),
        "bfloat16": (x.view(np.uint32) & 0xFFFF0000).view(np.float32),
    }
    return {name: np.ascontiguousarray(row, dtype=np.float32) for name, row in rows.items()}


# ---- against other programs ----
@needs_vectors
@on_devices
@types(CLOSED_FORM)
def test_bytes_of_ggml(fmt: Format, device: str) -> None:
    source, want, decoded = golden(fmt)
    got = quantize(source, fmt, device=device)
    defined = np.arange(len(source)) != DENORMALS
    for row in np.flatnonzero(defined):
        assert np.array_equal(got[row], want[row]), f"row {row}"
    assert np.array_equal(fmt.decode(got)[DENORMALS], decoded[DENORMALS])


@on_devices
@types(CLOSED_FORM)
def test_bytes_of_pypi_gguf(fmt: Format, device: str) -> None:
    gguf = pytest.importorskip("gguf")
    for name, x in awkward_rows(1024).items():
        try:
            with np.errstate(all="ignore"):
                want = gguf.quants.quantize(x, gguf.GGMLQuantizationType(fmt.type_id))
        except (NotImplementedError, ValueError, AttributeError):
            pytest.skip(f"PyPI gguf cannot write {fmt.name}")
        assert np.array_equal(quantize(x, fmt, device=device), want), name


@on_devices
@types(["NVFP4"])
def test_weights_above_the_largest_nvfp4_scale(fmt: Format, device: str) -> None:
    """ggml takes the first of the sixteen levels whose distance, a float32, is least: among weights
    that no longer feel the levels that is the zero."""
    rng = np.random.default_rng(0)
    x = 2.0 ** rng.uniform(11, 127, (64, 64)) * rng.choice([-1, 1], (64, 64))
    x = np.concatenate([x, rng.integers(-4000, 4000, (64, 64)), np.full((1, 64), np.inf)])
    x = x.astype(np.float32)
    x[:, ::16] = 3000
    blocks = quantize(x, fmt, device=device)
    assert (blocks[:, :4] == 0x7E).all()
    levels = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32) * 224
    levels = np.concatenate([levels, -levels])
    want = np.abs(levels - x[..., None]).argmin(axis=-1).reshape(-1, 4, 2, 8)
    packed = blocks[:, 4:].reshape(-1, 4, 8)
    assert np.array_equal(packed, want[:, :, 0] | want[:, :, 1] << 4)


@needs_vectors
@on_devices
@types(SEARCHED)
def test_row_errors_against_ggml(fmt: Format, device: str) -> None:
    source, _, decoded = golden(fmt)
    ours = rms(fmt.decode(quantize(source, fmt, device=device)) - source)
    ggml = rms(decoded - source)
    floor = 1e-7 * rms(source)  # where ggml has no error at all
    for row in range(len(source)):
        assert ours[row] <= 1.002 * ggml[row] + floor[row], f"row {row}"


@needs_vectors
@types(SEARCHED)
def test_oracle_is_ggml(fmt: Format) -> None:
    """ggml_search.py has every bit of what ggml's bytes decode to."""
    source, _, decoded = golden(fmt)
    assert np.array_equal(decoded_by_ggml(source, fmt.name), decoded)


@on_devices
@types(SEARCHED)
@pytest.mark.parametrize(("count", "cols"), [(60, 256), (6, 1024)])
def test_row_errors_of_difficult_rows(fmt: Format, count: int, cols: int, device: str) -> None:
    for name, x in stress_rows(count, cols, seed=cols).items():
        ours = rms(fmt.decode(quantize(x, fmt, device=device)) - x)
        ggml = rms(decoded_by_ggml(x, fmt.name) - x)
        too_large = ours > 1.002 * ggml + 1e-7 * rms(x)
        assert not too_large.any(), f"{name}, rows {np.flatnonzero(too_large)}"


@types(SEARCHED)
@pytest.mark.parametrize("factor", [1e-9, 1e-5, 1e6, 1e8])
def test_row_errors_far_from_one(fmt: Format, factor: float) -> None:
    """Halves lose bits below, float32 sums overflow above."""
    for name, x in stress_rows(8, 256, seed=1).items():
        x = x * np.float32(factor)
        ours = rms(fmt.decode(quantize(x, fmt)) - x)
        with np.errstate(all="ignore"):
            ggml = rms(decoded_by_ggml(x, fmt.name) - x)
        representable = np.isfinite(ggml)
        too_large = ours > 1.002 * ggml + 1e-7 * rms(x)
        assert not too_large[representable].any(), f"{name}, rows {np.flatnonzero(too_large)}"


@types(SEARCHED)
def test_row_errors_of_gaussian_weights(fmt: Format) -> None:
    """The same promise where ggml's vectors are not at hand: its mean error, measured once."""
    ggml = {
        "Q2_K": 0.29598, "Q3_K": 0.15143, "Q4_K": 0.07144, "Q5_K": 0.03627,
        "Q6_K": 0.01777, "IQ4_NL": 0.07647, "IQ4_XS": 0.07700,
    }  # fmt: skip
    x = gaussian(64, 1024)
    error = rms(fmt.decode(quantize(x, fmt)) - x) / rms(x)
    assert error.mean() <= ggml[fmt.name]


# ---- properties ----
@every_type
def test_zeros_stay_zero(fmt: Format) -> None:
    x = np.zeros((2, 2 * fmt.block_elems), np.float32)
    x[1] = -0.0
    if fmt.name != "Q1_0":  # it has no zero but d = 0
        x[1, 0] = 1
    decoded = fmt.decode(quantize(x, fmt))
    assert (decoded[0] == 0).all()
    assert (decoded[1, fmt.block_elems :] == 0).all()


@every_type
def test_powers_of_two_scale_through(fmt: Format) -> None:
    """Nothing in a search depends on the unit of x, as long as half scales stay normal numbers."""
    x = gaussian(8, 4 * fmt.block_elems, seed=1) + 0.2
    decoded = fmt.decode(quantize(x, fmt))
    for factor in (2.0, 64.0):
        scaled = fmt.decode(quantize((x * factor).astype(np.float32), fmt))
        assert np.array_equal(scaled, decoded * np.float32(factor)), factor


@every_type
def test_blocks_are_independent(fmt: Format) -> None:
    x = gaussian(1, 5 * fmt.block_elems, seed=2)
    whole = quantize(x, fmt)
    alone = [quantize(block, fmt) for block in np.split(x, 5, axis=1)]
    assert np.array_equal(whole, np.concatenate(alone, axis=1))


@types(USE_IMPORTANCE)
@pytest.mark.parametrize("kind", ["chi-square", "a third", "large", "small"])
def test_importance_lowers_the_weighted_error(fmt: Format, kind: str) -> None:
    x, rng = gaussian(64, 1024, seed=4), np.random.default_rng(5)
    importance = {
        "chi-square": rng.standard_normal(1024) ** 2,
        "a third": (rng.random(1024) < 0.3) * 1.0,
        "large": rng.random(1024) ** 4 * 1e30,
        "small": rng.random(1024) ** 4 * 1e-30,
    }[kind].astype(np.float32)

    def weighted(blocks: np.ndarray) -> float:
        error = (fmt.decode(blocks) - x).astype(np.float64) ** 2
        return float((error * importance).sum() / importance.sum())

    plain = weighted(quantize(x, fmt))
    assert weighted(quantize(x, fmt, importance)) < 0.95 * plain


@types(USE_IMPORTANCE)
def test_equal_importance_is_no_importance(fmt: Format) -> None:
    x = gaussian(16, 1024, seed=6)
    plain = rms(fmt.decode(quantize(x, fmt)) - x)
    equal = rms(fmt.decode(quantize(x, fmt, np.full(1024, 3, np.float32))) - x)
    assert (equal <= plain * 1.001).all()  # below the closed form's, where there is one


@on_devices
@every_type
def test_any_bits_give_valid_blocks(fmt: Format, device: str) -> None:
    """NaN, infinity, denormals, numbers beyond a half: the same bytes every time, and where scales
    are searched for they are finite (NaN counts as 0, infinity as the largest number)."""
    for x in (
        any_bits(8, 1024),
        np.where(np.random.default_rng(1).random((8, 1024)) < 0.02, any_bits(8, 1024), 1),
        np.full((1, 1024), np.nan),
        np.full((1, 1024), -np.inf),
        np.full((1, 1024), np.finfo(np.float32).max),
        np.full((1, 1024), 1e-45),
    ):
        x = x.astype(np.float32)
        blocks = quantize(x, fmt, device=device)
        assert np.array_equal(blocks, quantize(x, fmt))
        if fmt.name in SEARCHED:
            assert np.isfinite(fmt.decode(blocks)).all()


@types(USE_IMPORTANCE)
def test_any_importance_gives_valid_blocks(fmt: Format) -> None:
    x = gaussian(4, 1024, seed=7)
    scale = rms(x)
    for value in (0, -1, np.nan, np.inf, 1e-45):
        blocks = quantize(x, fmt, np.full(1024, value, np.float32))
        assert (rms(fmt.decode(blocks) - x) < 0.5 * scale).all(), value
    assert np.isfinite(fmt.decode(quantize(x, fmt, any_bits(1024)))).all()


@pytest.mark.cuda
@every_type
def test_cuda_gives_the_bytes_of_the_cpu(fmt: Format) -> None:
    rows = awkward_rows(1024)
    rows["any bits"] = any_bits(64, 1024, seed=8)
    rows["many"] = gaussian(1027, 1024, seed=9)
    weights = [None]
    if fmt.name in USE_IMPORTANCE:
        weights += [gaussian(1024, seed=10) ** 2, any_bits(1024, seed=11)]
    for name, x in rows.items():
        for importance in weights:
            want = quantize(x, fmt, importance)
            got = quantize(x, fmt, importance, device="cuda")
            assert np.array_equal(got, want), f"{name}, {np.argwhere(got != want)[0]}"


# ---- the op ----
@on_devices
@every_type
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_inputs(fmt: Format, dtype: torch.dtype, device: str) -> None:
    x = torch.from_numpy(gaussian(3, 5 * fmt.block_elems, seed=12)).to(device, dtype)
    want = ops.quantize(x.float(), fmt.type_id)
    assert torch.equal(ops.quantize(x, fmt.type_id), want)


@on_devices
@types(["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_leading_dimensions_and_strides(fmt: Format, device: str) -> None:
    x = torch.from_numpy(gaussian(12, 512, seed=13)).to(device)
    want = ops.quantize(x, fmt.type_id)
    row_bytes = fmt.row_bytes(512)
    assert want.shape == (12, row_bytes) and want.dtype == torch.uint8 and want.device == x.device
    views = [
        (x.view(2, 3, 2, 512), want.view(2, 3, 2, row_bytes)),
        (x[::3], want[::3]),
        (x[4], want[4]),
    ]
    for view, result in views:
        assert torch.equal(ops.quantize(view, fmt.type_id), result)
    assert torch.equal(ops.quantize(x.t().contiguous().t(), fmt.type_id), want)
    assert ops.quantize(x[:0], fmt.type_id).shape == (0, row_bytes)
    assert ops.quantize(x[:, :0], fmt.type_id).shape == (12, 0)


@on_devices
def test_does_not_touch_its_inputs(device: str) -> None:
    x = torch.from_numpy(gaussian(4, 256)).to(device)
    importance = torch.rand(256, device=device)
    before = x.clone(), importance.clone()
    ops.quantize(x, QType.Q4_K, importance)
    assert torch.equal(x, before[0]) and torch.equal(importance, before[1])


@on_devices
@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((torch.zeros(2, 33), QType.Q4_0), ValueError,
         "x: row of 33 values is not a multiple of the 32-value Q4_0 block"),
        ((torch.zeros(2, 128), QType.Q4_K), ValueError,
         "x: row of 128 values is not a multiple of the 256-value Q4_K block"),
        ((torch.zeros(2, 256), QType.IQ2_XXS), NotImplementedError,
         r"cannot quantize to IQ2_XXS; types that can be written: Q4_0, .*IQ4_XS"),
        ((torch.zeros(2, 256), QType.F16), NotImplementedError, "cannot quantize to F16"),
        ((torch.zeros(2, 256), 4), ValueError, "qtype: 4 is not a GGUF type"),
        ((torch.zeros(2, 32, dtype=torch.int8), QType.Q4_0), TypeError, "x: .*torch.int8"),
        ((torch.zeros(()), QType.Q4_0), ValueError, "x: expected at least one dimension"),
        ((torch.zeros(2, 32), QType.Q8_0, torch.ones(32)), NotImplementedError,
         "importance: Q8_0 .*types that use it: Q4_0, "),
        ((torch.zeros(2, 64), QType.Q4_0, torch.ones(32)), ValueError,
         r"importance: expected shape \[64\]"),
        ((torch.zeros(2, 64), QType.Q4_0, torch.ones(64).double()), TypeError,
         "importance: expected torch.float32, got torch.float64"),
    ],
)  # fmt: skip
def test_mistakes_are_named(args: tuple, error: type, text: str, device: str) -> None:
    on_device = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(error, match=text):
        ops.quantize(*on_device)
