# SPDX-License-Identifier: MIT
"""What ggml makes of a weight matrix in the types whose scales it searches for: a numpy version of
its reference encoders, in float32 and with their order of additions, so that all bits come out the
same. And rows on which searches part: `stress_rows`."""

from __future__ import annotations

import numpy as np

F32 = np.float32
LEVELS_OF_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], F32
)
TINY = F32(1e-15)  # groups below are written as zeros


def added(terms: np.ndarray) -> np.ndarray:
    """Column sums, one row after the other."""
    total = np.zeros_like(terms[0])
    for row in terms:
        total = total + row
    return total


def nearest(t: np.ndarray) -> np.ndarray:
    """Integers by the rounding of a float addition; beyond 2^22 the nonsense that ggml gets."""
    bits = (t.astype(F32) + F32(12582912)).view(np.int32)
    return ((bits & 0x7FFFFF) - 0x400000).astype(F32)


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(F32)


def iq4(t: np.ndarray) -> np.ndarray:
    upper = np.clip(np.searchsorted(LEVELS_OF_IQ4, t, side="right"), 1, 15)
    below, above = LEVELS_OF_IQ4[upper - 1], LEVELS_OF_IQ4[upper]
    return np.where(t - below < above - t, below, above)


def extreme(x: np.ndarray) -> np.ndarray:
    """Of each column the number of largest magnitude, the first of several."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]


# ---- one group, alone: x has a group in every column ----
def scale_and_minimum(
    x: np.ndarray, weights: np.ndarray, high: int, first: float, steps: int, absolute: bool
) -> tuple[np.ndarray, np.ndarray]:
    """x ≈ scale · code − minimum: regressions of x on its codes under several first guesses; the
    best by weighted squared (or absolute) error. Each guess starts at the best minimum so far."""
    offset, top = np.minimum(x.min(axis=0), F32(0)), x.max(axis=0)
    flat, minimum_if_flat = offset == top, -offset
    loss = np.abs if absolute else np.square
    sum_w, sum_x = added(weights), added(weights * x)

    def codes(guess: np.ndarray) -> np.ndarray:
        return np.clip(nearest(guess * (x - offset)), 0, high)

    guess = high / (top - offset)
    scale = 1 / guess
    least = added(weights * loss(scale * codes(guess) + offset - x))
    for step in range(steps + 1):
        q = codes((F32(first) + F32(0.1) * F32(step) + high) / (top - offset))
        sum_q, sum_qq, sum_xq = added(weights * q), added(weights * q * q), added(weights * q * x)
        spread = sum_w * sum_qq - sum_q * sum_q
        at = (sum_qq * sum_x - sum_q * sum_xq) / spread
        slope = np.where(at > 0, sum_xq / sum_qq, (sum_w * sum_xq - sum_x * sum_q) / spread)
        at = np.minimum(at, 0)
        error = added(weights * loss(slope * q + at - x))
        better = (spread > 0) & (error < least)
        least = np.where(better, error, least)
        scale, offset = np.where(better, slope, scale), np.where(better, at, offset)
    return np.where(flat, F32(0), scale), np.where(flat, minimum_if_flat, -offset)


def scale_by_guesses(x: np.ndarray, landings: list[F32], levels) -> np.ndarray:
    """x ≈ scale · level, errors weighted by x²: regressions with the extreme on several levels."""
    weights, largest = x * x, extreme(x)
    best = scale = None
    for landing in landings:
        q = levels(landing / largest * x)
        # The order of the products decides between guesses that are equally good.
        terms = weights * q * x if levels is iq4 else weights * x * q
        xq, qq = added(terms), added(weights * q * q)
        if best is None:
            scale = np.where(qq > 0, xq / qq, F32(0))
            best = scale * xq
            continue
        better = (qq > 0) & (xq * xq > best * qq)
        scale = np.where(better, xq / qq, scale)
        best = np.where(better, xq / qq * xq, best)
    return np.where(np.abs(largest) < TINY, F32(0), scale)


def scale_by_descent(x: np.ndarray) -> np.ndarray:
    """The three-bit search: codes change one at a time while the error, weighted by x², falls."""
    weights, largest = x * x, extreme(x)
    q = np.clip(nearest(-4 / largest * x), -4, 3)
    xq, qq = added(weights * x * q), added(weights * q * q)
    for _ in range(5):
        for i in range(len(x)):
            other_xq = xq - weights[i] * x[i] * q[i]
            other_qq = qq - weights[i] * q[i] * q[i]
            code = np.clip(nearest(x[i] * other_qq / other_xq), -4, 3)
            new_xq = other_xq + weights[i] * x[i] * code
            new_qq = other_qq + weights[i] * code * code
            change = (other_xq > 0) & (code != q[i]) & (new_qq > 0)
            change &= new_xq * new_xq * qq > xq * xq * new_qq
            q[i] = np.where(change, code, q[i])
            xq, qq = np.where(change, new_xq, xq), np.where(change, new_qq, qq)
    return np.where((np.abs(largest) < TINY) | ~(qq > 0), F32(0), xq / qq)


# ---- whole blocks: what the encoded matrix decodes to ----
def in_groups(x: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(x.reshape(-1, size).T)


def with_minima(x: np.ndarray, size: int, high: int, steps: int, last: int) -> np.ndarray:
    groups = in_groups(x, size)
    weights = np.abs(groups)
    if size == 32:
        weights = np.sqrt(added(groups * groups) / 32) + weights
    first = -1 if steps == 20 else -0.5
    fits = scale_and_minimum(groups, weights, high, first, steps, absolute=size == 16)
    steps_of = []
    for fit in fits:
        fit = fit.reshape(-1, 256 // size)
        largest = np.maximum(fit.max(axis=1, keepdims=True), 0)
        inverse = np.where(largest > 0, last / largest, F32(0))
        integers = np.minimum(nearest(inverse * fit), last)
        steps_of.append((half(largest / last) * integers).ravel())
    d, minimum = steps_of
    q = np.clip(nearest((groups + minimum) / np.where(d == 0, F32(1), d)), 0, high)
    return (d * q - minimum).T.reshape(x.shape)


def without_minima(x: np.ndarray, size: int, scale: np.ndarray, low: int, levels) -> np.ndarray:
    scale, groups = scale.reshape(-1, 256 // size), in_groups(x, size)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], axis=1)
    largest = np.where(largest == 0, F32(np.inf), largest)  # nothing but zeros: d becomes 0
    if levels is iq4:  # found with the scale before it becomes a half
        d = np.where(np.isinf(largest), F32(0), largest / low)
        integers = np.clip(nearest(1 / np.where(d == 0, F32(np.inf), d) * scale), low, -low - 1)
        step = (d * integers).ravel()
        q = levels(1 / np.where(step == 0, F32(np.inf), step) * groups)
    else:
        inverse = low / largest
        d = np.where(inverse == 0, F32(0), 1 / inverse)
        integers = np.clip(nearest(inverse * scale), low, -low - 1)
        step = (half(d) * integers).ravel()
        q = levels(groups / np.where(step == 0, F32(1), step))
    return ((half(d) * integers).ravel() * q).T.reshape(x.shape)


def levels_of(bits: int):
    return lambda t: np.clip(nearest(t), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def decoded_by_ggml(x: np.ndarray, name: str) -> np.ndarray:
    """The matrix x [rows, columns] after ggml has encoded and decoded it. Rows that it cannot
    represent come back with infinities or NaN."""
    with np.errstate(all="ignore"):
        if name in ("Q2_K", "Q4_K", "Q5_K"):
            size, high, steps, scales = {
                "Q2_K": (16, 3, 15, 15), "Q4_K": (32, 15, 20, 63), "Q5_K": (32, 31, 15, 63),
            }[name]  # fmt: skip
            return with_minima(x, size, high, steps, scales)
        if name == "Q3_K":
            return without_minima(x, 16, scale_by_descent(in_groups(x, 16)), -32, levels_of(3))
        if name == "Q6_K":
            tries = [0, *range(-9, 0), *range(1, 10)]
            landings = [-(32 + F32(0.1) * F32(i)) for i in tries]
            scale = scale_by_guesses(in_groups(x, 16), landings, levels_of(6))
            return without_minima(x, 16, scale, -128, levels_of(6))
        landings = [F32(127), *(F32(i - 127) for i in range(-7, 8))]
        groups = in_groups(x, 32)
        scale = scale_by_guesses(groups, landings, iq4)
        if name == "IQ4_XS":
            return without_minima(x, 32, scale, -32, iq4)
        q = iq4(np.where(scale == 0, F32(0), 1 / scale) * groups)
        return (half(scale) * q).T.reshape(x.shape)


# ---- rows ----
def stress_rows(count: int, cols: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`count` rows of each kind."""
    rng = np.random.default_rng(seed)
    shape = (count, cols)
    x = rng.standard_normal(shape)

    def outliers(share: float) -> np.ndarray:
        size = rng.uniform(5, 100, shape) * rng.choice([-1, 1], shape)
        return np.where(rng.random(shape) < share, size, rng.standard_normal(shape))

    def per_group(size: int, spread: float) -> np.ndarray:
        """A factor per group of `size`, over `spread` powers of ten."""
        return 10 ** rng.uniform(-spread, 0, (count, cols // size)).repeat(size, axis=1)

    where = np.arange(cols) / cols
    means = rng.standard_normal((count, cols // 32))
    start, slope = rng.uniform(-1, 1, (2, count, 1))
    rows = {
        "gaussian": x,
        "laplace": rng.laplace(size=shape),
        "uniform": rng.uniform(-1, 1, shape),
        "positive": rng.uniform(0, 1, shape) ** 2,
        "shifted": x + rng.uniform(-8, 8, (count, 1)),
        "student 1.5": rng.standard_t(1.5, shape),
        "student 3": rng.standard_t(3, shape),
        "log-normal": rng.lognormal(0, 2, shape) * rng.choice([-1, 1], shape),
        "an outlier": outliers(1 / 256),
        "outliers": outliers(0.03),
        "ramp": start + slope * where,
        "noisy ramp": start + slope * where + 0.01 * x,
        "waves": np.sin(2 * np.pi * (start + 40 * slope * where)),
        "constant": rng.standard_normal((count, 1)).repeat(cols, axis=1),
        "constant groups": rng.standard_normal((count, cols // 16)).repeat(16, axis=1),
        "signs": rng.choice([-1.0, 1.0], shape) * rng.uniform(0.1, 2, (count, 1)),
        "ternary": rng.choice([-1.0, 0.0, 1.0], shape),
        "few integers": rng.integers(-9, 10, shape),
        "sparse": np.where(rng.random(shape) < 0.1, x, 0),
        "very sparse": np.where(rng.random(shape) < 0.01, x, 0),
        "tiny": x * 1e-4,
        "huge": x * 1e4,
        "bimodal": rng.choice([-1, 1], shape) + 0.1 * x,
        "two scales": x * rng.choice([0.01, 1], shape),
        "groups of 16": x * per_group(16, 3),
        "groups of 32": x * per_group(32, 3),
        "shifted groups": x * per_group(32, 1) + means.repeat(32, axis=1),
        "quantised": np.round(2 * x) / 4 * per_group(32, 2),
        "bfloat16": (x.astype(F32).view(np.uint32) & 0xFFFF0000).view(F32),
    }  # fmt: skip
    return {name: np.ascontiguousarray(row, dtype=F32) for name, row in rows.items()}
