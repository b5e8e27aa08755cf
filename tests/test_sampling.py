# SPDX-License-Identifier: MIT
"""Three implementations that agree, exact cases, truncation, status bits, invariances, mistakes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import DEVICES

from quantgemm import ops
from quantgemm import reference as ref

Tensor = torch.Tensor


def ragged_case(batch: int, most: int, vocab: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Probabilities with zeros in them, some rows of q equal to p, drafts drawn from q."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, most + 2, (batch,), generator=g)
    cu_rows = torch.zeros(batch + 1, dtype=torch.int64)
    cu_rows[1:] = rows.cumsum(0)
    p = torch.randn(int(cu_rows[-1]), vocab, generator=g).mul(2).softmax(-1)
    p[torch.rand(p.shape, generator=g) < 0.2] = 0
    q = torch.randn(batch, most, vocab, generator=g).mul(2).softmax(-1)
    for b in range(0, batch, 3):
        for k in range(int(rows[b]) - 1):
            q[b, k] = p[int(cu_rows[b]) + k]
    q[..., 0] += 1e-6
    drafts = torch.multinomial(q.flatten(0, 1), 1, generator=g).view(batch, most)
    drafts[torch.rand(drafts.shape, generator=g) < 0.03] = -1
    drafts[torch.rand(drafts.shape, generator=g) < 0.02] = vocab + 5
    return {
        "target": p.to(dtype),
        "draft_tokens": drafts,
        "cu_rows": cu_rows,
        "draft": q.to(dtype),
        "target_probs": True,
        "draft_probs": True,
    }


def on(device: str, case: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.items()}


def seeds(batch: int) -> dict[str, Tensor]:
    order = torch.arange(batch)
    return {"seed": order * 977 - 40, "position": order * (1 << 30) + 5}


def uniforms(batch: int, most: int, seed: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"uniforms": torch.rand(batch, most + 1, generator=g, dtype=torch.float64)}


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b, name in zip(got, want, ("tokens", "count", "logprobs", "status"), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=2e-6, msg=name)
        else:
            assert torch.equal(a.cpu(), b.cpu()), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [3, 61, 64, 1000, 4099])
@pytest.mark.parametrize("noise", ["seeds", "uniforms"])
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_three_agree_on_probabilities(
    vocab: int, dtype: torch.dtype, noise: str, one_hot: bool, mixed: bool, device: str
) -> None:
    batch, most = 24, 5
    case = ragged_case(batch, most, vocab, dtype, vocab)
    case |= seeds(batch) if noise == "seeds" else uniforms(batch, most)
    if one_hot:
        case |= {"draft": None, "draft_probs": False}
    if mixed:
        case["temperature"] = (torch.arange(batch) % 2).float()
    want = ref.rejection_sample_loop(**case)
    assert_equal(ops.spec_verify(**on(device, case)), want)
    case = on(device, case)
    vectorized = ref.rejection_sample_vectorized(**case)
    for a, b in zip(vectorized[:3], want[:3], strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_more_drafts_than_warps(device: str) -> None:
    case = ragged_case(12, 40, 17, torch.float32, 5) | seeds(12)
    case["draft"][:, :, :] = 0
    for b in range(12):
        n = int(case["cu_rows"][b + 1] - case["cu_rows"][b]) - 1
        first = int(case["cu_rows"][b])
        case["draft"][b, :n] = case["target"][first : first + n]
        case["draft_tokens"][b, :n] = case["target"][first : first + n].argmax(-1)
    got = ops.spec_verify(**on(device, case))
    assert (got[1].cpu() == case["cu_rows"].diff()).all() and got[1].max() > 20
    assert_equal(got, ref.rejection_sample_loop(**case))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ["forward", "shuffled"])
def test_smaller_draft_vocabulary(order: str, device: str) -> None:
    case = ragged_case(16, 4, 300, torch.float32, 8) | seeds(16)
    g = torch.Generator().manual_seed(1)
    chosen = torch.randperm(300, generator=g)[:100]
    chosen = chosen.sort().values if order == "forward" else chosen
    to_draft = torch.full((300,), -1)
    to_draft[chosen] = torch.arange(100)
    q = torch.rand(16, 4, 100, generator=g).softmax(-1)
    case |= {"draft": q, "target_to_draft": to_draft}
    case["draft_tokens"] = chosen[torch.multinomial(q.flatten(0, 1), 1, generator=g)].view(16, 4)
    case["draft_tokens"][0, 0] = int((to_draft < 0).nonzero()[0])  # q = 0 there: never accepted
    want = ref.rejection_sample_loop(**case)
    assert_equal(ops.spec_verify(**on(device, case)), want)
    vectorized = ref.rejection_sample_vectorized(**on(device, case))
    assert torch.equal(vectorized[0].cpu(), want[0])
    assert torch.equal(ops.invert_vocabulary_map(chosen, 300), to_draft)
    del case["target_to_draft"]
    assert_equal(ops.spec_verify(**on(device, case), draft_to_target=chosen.to(device)), want)
    outside = torch.tensor([2, 300, -1, 0])  # padding of a draft's vocabulary has no place
    assert ops.invert_vocabulary_map(outside, 3).tolist() == [3, -1, 0]


def simple(
    p: Tensor, drafts: list[int], q: Tensor | None = None, **more: Any
) -> tuple[Tensor, ...]:
    """One sequence, uniforms 0.5 unless given."""
    k = len(drafts)
    case: dict[str, Any] = {
        "target": p,
        "draft_tokens": torch.tensor([drafts], dtype=torch.int64).view(1, k),
        "cu_rows": torch.tensor([0, k + 1]),
        "draft": q,
        "target_probs": True,
        "draft_probs": q is not None,
        "uniforms": torch.full((1, k + 1), 0.5, dtype=torch.float64),
    } | more
    device = case.pop("device", "cpu")
    return tuple(t.cpu() for t in ops.spec_verify(**on(device, case)))


@pytest.mark.parametrize("device", DEVICES)
def test_exact_cases(device: str) -> None:
    p = torch.rand(4, 70, generator=torch.Generator().manual_seed(0)).softmax(-1)
    almost_one = torch.full((1, 4), 1 - 2**-53, dtype=torch.float64)
    tokens, count, _, _ = simple(p, [3, 9, 69], p[None, :3], uniforms=almost_one, device=device)
    assert count == 4 and tokens[0, :3].tolist() == [3, 9, 69]  # q == p accepts everything

    halves = torch.zeros(2, 70)
    halves[:, :35] = 1 / 35
    other = halves.flip(1)[None, :1]
    tokens, count, _, _ = simple(halves, [50], other, device=device)
    assert count == 1 and 0 <= tokens[0, 0] < 35 and tokens[0, 1] == -1  # disjoint supports

    point = torch.zeros(4, 70)
    point[range(4), [5, 6, 7, 8]] = 1
    tokens, count, logprobs, _ = simple(point, [5, 6, 9], device=device)
    assert tokens.tolist() == [[5, 6, 7, -1]] and count == 3 and not logprobs.any()

    tokens, count, _, status = simple(point[:1], [], device=device)  # no drafts
    assert tokens.tolist() == [[5]] and count == 1 and status == 0

    zero = torch.zeros(1, 2, dtype=torch.float64)
    q = torch.full((1, 1, 70), 1 / 70)
    tokens, _, _, _ = simple(point[:2], [6], q, uniforms=zero, device=device)
    assert tokens[0, 0] == 5  # p(d) = 0 is refused even with u = 0
    no_q = torch.zeros(1, 1, 70)
    no_q[..., 0] = 1
    tokens, count, _, status = simple(point[:2], [5], no_q, uniforms=zero, device=device)
    assert count == 1 and tokens[0, 0] == 5 and status == 0  # q(d) = 0 is refused


@pytest.mark.parametrize("device", DEVICES)
def test_status_bits(device: str) -> None:
    p = torch.full((2, 9), 1 / 9)
    tokens, count, _, status = simple(p, [9], device=device)
    assert count == 1 and status == ref.BAD_TOKEN and 0 <= tokens[0, 0] < 9
    tokens, count, _, status = simple(p, [-1], device=device)
    assert count == 1 and status == 0 and 0 <= tokens[0, 0] < 9
    tokens, _, _, status = simple(p, [-7], device=device, temperature=torch.zeros(1))
    assert tokens[0, 0] == 0 and status == ref.BAD_TOKEN

    bad = p.clone()
    bad[0, 4] = math.nan
    _, _, _, status = simple(bad, [-1], device=device)
    assert status == ref.BAD_VALUE
    tokens, _, _, status = simple(torch.zeros(2, 9), [-1], device=device)
    assert tokens[0, 0] == 0 and status == ref.NO_MASS
    q = torch.full((1, 1, 9), 1.0)
    tokens, _, _, status = simple(p, [3], q, device=device)
    assert status == ref.EMPTY_RESIDUAL and tokens[0, 0] == 4  # the middle of p
    _, _, _, status = simple(p, [3], device=device, temperature=torch.tensor([math.nan]))
    assert status == ref.BAD_PARAMETER
    for first, last in ((0, 5), (-1, 1), (1, 1), (2, 1), (1, 3)):
        tokens, count, _, status = simple(
            p, [3], device=device, cu_rows=torch.tensor([first, last])
        )
        assert count == 0 and status == ref.BAD_ROWS and (tokens == -1).all()
    wrong = torch.tensor([[2.0, math.nan]], dtype=torch.float64)
    tokens, _, _, status = simple(p, [3], device=device, uniforms=wrong)
    assert status == ref.BAD_UNIFORM and tokens[0, 0] == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("probs", [False, True])
def test_garbage_never_leaves_the_vocabulary(probs: bool, device: str) -> None:
    g = torch.Generator().manual_seed(4)
    bits = torch.randint(-(2**31), 2**31, (200, 130), generator=g, dtype=torch.int64)
    values = bits.to(torch.int32).view(torch.float32)
    values[5], values[9] = math.nan, -math.inf
    drafts = torch.randint(-3, 140, (50, 3), generator=g)
    case = {"target": values, "draft_tokens": drafts, "cu_rows": torch.arange(0, 201, 4)}
    case |= {"draft": values[:150].reshape(50, 3, 130), "target_probs": probs, "draft_probs": probs}
    case |= seeds(50)
    case["temperature"] = torch.rand(50, generator=g) - 0.2
    if not probs:
        case["top_k"] = torch.randint(-2, 140, (50,), generator=g)
        case["top_p"] = torch.rand(50, generator=g) * 1.5 - 0.2
        case["min_p"] = torch.rand(50, generator=g) - 0.5
    tokens, count, _, status = (t.cpu() for t in ops.spec_verify(**on(device, case)))
    inside = torch.arange(4) < count[:, None]
    assert ((tokens >= 0) & (tokens < 130))[inside].all() and (tokens[~inside] == -1).all()
    assert (count >= 1).all() and (count <= 4).all() and status.any()


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_takes_the_lowest_of_equals(device: str) -> None:
    logits = torch.zeros(6, 5000)
    logits[0, [7, 4000]] = 2
    logits[1, [4999]] = 2
    logits[2] = -math.inf
    logits[3, 4096:] = math.inf
    logits[4, 3] = math.nan
    logits[5, 0], logits[5, 1:] = -0.0, 0.0
    zero = torch.zeros(6)
    tokens, _, status = ops.sample(logits.to(device), zero.to(device), **on(device, seeds(6)))
    assert tokens.tolist() == [7, 4999, 0, 4096, 0, 0]
    assert status.tolist() == [0, 0, ref.NO_MASS, ref.BAD_VALUE, ref.BAD_VALUE, 0]


TRUNCATIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1e-6},
    {"temperature": 1e4},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 512},  # as many as a list holds, and one more
    {"top_k": 513},
    {"top_k": 1500},
    {"top_k": 3000, "temperature": 2.0},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.999, "temperature": 1.5},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.5, "min_p": 0.2, "temperature": 1.7},
    {"top_k": 3000, "top_p": 0.95},
]


def filled(settings: dict[str, Any], rows: int, device: str) -> dict[str, Tensor]:
    return {
        name: torch.full(
            (rows,), value, dtype=torch.int64 if name == "top_k" else torch.float32, device=device
        )
        for name, value in settings.items()
    }


def assert_law(
    drawn: tuple[Tensor, ...], b: int, row: Tensor, settings: dict[str, Any], moves: int
) -> None:
    """draft_sample's row b against float64, but for the token. Rounding may move the edge of top-p
    and min-p by `moves` values."""
    _, lse, cutoff, got, status = (x[b].cpu() for x in drawn)
    want = ref.truncated_softmax(row, **settings)
    got = got.double()
    moved = (got > 0) != (want.float() > 0)
    moved &= torch.maximum(got, want) > 1e-30
    assert status == 0 and moved.sum() <= moves
    # The rest share what the moved ones gained or lost.
    slack = 4e-6 + 2 * float((got[moved].sum() - want[moved].sum()).abs())
    assert ((got - want).abs()[~moved] <= slack * want[~moved] + 1e-30).all()
    kept = row.double() >= cutoff.item()
    full = torch.logsumexp(row.double()[kept] / settings.get("temperature", 1.0), 0)
    torch.testing.assert_close(lse.double(), full, rtol=3e-6, atol=3e-6)


def assert_token(token: int, probs: Tensor, u: float) -> None:
    """Where the noise points in the cumulative distribution."""
    p = float(probs[token])
    before = float(probs[: token + 1].sum(dtype=torch.float64))
    assert p > 0
    assert before >= u - 1e-5 >= before - p - 2e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_distribution_of_logits(settings: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """draft_sample's probabilities, log-sum-exp, cutoff and token against float64."""
    rows = []
    for vocab in (5, 61, 4099, 70001):
        logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)).mul(2)
        logits[1, : vocab // 3] = -math.inf
        logits[2] = logits[2].mul(4).round().div(4)  # ties everywhere, at the edges too
        rows.append(logits.to(dtype))
    for logits in rows:
        u = torch.tensor([[0.1], [0.6], [0.999]], dtype=torch.float64, device=device)
        drawn = ops.draft_sample(
            logits.to(device), **filled(settings, 3, device), uniforms=u, return_probs=True
        )
        edge = ("top_p" in settings or "min_p" in settings) and dtype == torch.float32
        for b in range(3):
            assert_law(drawn, b, logits[b], settings, 2 if edge and b < 2 else 0)
            assert_token(int(drawn[0][b]), drawn[3][b], float(u[b]))


@pytest.mark.cuda
def test_truncation_equals_the_cpu() -> None:
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(64, 128256, generator=g) * torch.rand(64, 1, generator=g) * 6
    settings = {
        "temperature": torch.rand(64, generator=g) + 0.2,
        "top_k": torch.randint(0, 400, (64,), generator=g),
        "top_p": torch.rand(64, generator=g) * 0.5 + 0.5,
        "min_p": torch.rand(64, generator=g) * 0.01,
    }
    u = uniforms(64, 0)
    want = ops.draft_sample(logits, **settings, **u)
    got = ops.draft_sample(logits.cuda(), **on("cuda", settings), **on("cuda", u))
    same_cutoff = got[2].cpu() == want[2]
    assert same_cutoff.float().mean() > 0.95
    assert (got[0].cpu() == want[0]).float().mean() > 0.8
    torch.testing.assert_close(
        got[1].cpu()[same_cutoff], want[1][same_cutoff], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("given", ["lse", "rows", "probs", "one-hot"])
def test_logits_against_the_loop(given: str, truncated: bool, device: str) -> None:
    """Equal but for draws that rounding of exp decides; then the neighbourhood must explain it."""
    batch, most, vocab = 48, 4, 3001
    g = torch.Generator().manual_seed(6)
    base = torch.randn(batch, most + 1, vocab, generator=g) * 3
    draft = base[:, :most] + 0.5 * torch.randn(batch, most, vocab, generator=g)
    heat = torch.rand(batch, generator=g) + 0.5
    heat[::5] = 0
    settings: dict[str, Tensor] = {"temperature": heat}
    if truncated:
        settings |= {"top_k": torch.full((batch,), 40), "top_p": torch.full((batch,), 0.95)}
    repeated = {name: value.repeat_interleave(most).to(device) for name, value in settings.items()}
    noise = seeds(batch)
    drawn = ops.draft_sample(
        draft.flatten(0, 1).to(device),
        **repeated,
        seed=noise["seed"].repeat_interleave(most).to(device),
        position=(noise["position"][:, None] + torch.arange(most)).flatten().to(device),
        return_probs=True,
    )
    tokens, lse, cutoff, probs, _ = drawn
    case: dict[str, Any] = {
        "target": base.flatten(0, 1),
        "draft_tokens": tokens.view(batch, most),
        "cu_rows": torch.arange(batch + 1) * (most + 1),
    }
    case |= settings | noise
    if given != "one-hot":
        case["draft"] = draft
    if given == "probs":
        case |= {"draft": probs.view(batch, most, vocab), "draft_probs": True}
    if given == "lse":
        case |= {"draft_lse": lse.view(batch, most), "draft_cutoff": cutoff.view(batch, most)}
    got = [t.cpu() for t in ops.spec_verify(**on(device, case))]
    want = [t.cpu() for t in ref.rejection_sample_loop(**on("cpu", case))]
    rows = [t.cpu() for t in ref.rejection_sample_vectorized(**on("cpu", case))]
    assert torch.equal(rows[0], want[0]) and torch.equal(rows[1], want[1])
    same = (got[0] == want[0]).all(1)
    assert same.float().mean() >= 0.9 and (got[1] == want[1]).float().mean() >= 0.97
    assert got[1].float().mean() > (1.2 if given == "one-hot" else 2.0)
    torch.testing.assert_close(got[2][same], want[2][same], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[3], want[3])


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_misaligned_rows(device: str) -> None:
    case = ragged_case(9, 3, 1001, torch.float32, 12) | seeds(9)
    want = ops.spec_verify(**on(device, case))
    p = torch.full((case["target"].shape[0], 1100), math.nan)
    p[:, 37:1038] = case["target"]
    q = torch.full((9, 3, 1024), math.nan)
    q[..., 1:1002] = case["draft"]
    moved = on(device, case | {"target": p, "draft": q})
    moved["target"], moved["draft"] = moved["target"][:, 37:1038], moved["draft"][..., 1:1002]
    for a, b in zip(ops.spec_verify(**moved), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("probs", [True, False])
def test_batch_and_grid_do_not_matter(probs: bool) -> None:
    """Alone, among few and among many: other cluster sizes, the same bits. And 100 repeats."""
    batch, most, vocab = 300, 3, 40000
    g = torch.Generator(device="cuda").manual_seed(0)
    target = torch.randn(batch * 4, vocab, generator=g, device="cuda")
    draft = torch.randn(batch, most, vocab, generator=g, device="cuda")
    if probs:
        target, draft = target.softmax(-1), draft.softmax(-1)
    drafts = torch.randint(0, vocab, (batch, most), device="cuda", generator=g)
    noise = on("cuda", seeds(batch))
    more: dict[str, Tensor] = {}
    if not probs:
        more = filled({"top_k": 30, "top_p": 0.8}, batch, "cuda")

    def run(chosen: Tensor) -> tuple[Tensor, ...]:
        rows = (chosen[:, None] * 4 + torch.arange(4, device="cuda")).flatten()
        cu_rows = torch.arange(len(chosen) + 1, device="cuda") * 4
        picked = {k: v[chosen] for k, v in (noise | more).items()}
        return ops.spec_verify(
            target[rows], drafts[chosen], cu_rows, draft[chosen], probs, probs, **picked
        )

    everyone = torch.arange(batch, device="cuda")
    want = run(everyone)
    for chosen in (everyone.flip(0), everyone[:1], everyone[7:47], everyone[100:240:2]):
        for a, b in zip(run(chosen), want, strict=True):
            assert torch.equal(a, b[chosen])
    for _ in range(100):
        for a, b in zip(run(everyone), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 37, 2048, 20011, 128256, 300000])
@pytest.mark.parametrize("truncated", [False, True])
def test_rows_end_alike_in_one_launch_and_two(
    vocab: int, dtype: torch.dtype, truncated: bool
) -> None:
    """Up to 64 rows, or 32, are read and ended by one kernel, more of them by two."""
    batch = 100
    g = torch.Generator(device="cuda").manual_seed(vocab)
    logits = torch.randn(batch, vocab, generator=g, device="cuda").mul(3).to(dtype)
    places = torch.arange(batch, device="cuda")
    kinds = places % 8
    logits[kinds == 1, vocab // 2] = torch.inf
    logits[kinds == 2, vocab // 3] = torch.nan
    logits[kinds == 3] = -torch.inf
    logits[kinds == 4] = logits[kinds == 4].round()  # ties
    greedy = places // 8 % 3 == 2
    more = on("cuda", seeds(batch)) | {"temperature": torch.where(greedy, 0.0, 0.7)}
    if truncated:
        more["top_k"] = torch.tensor([50, 0, 1, 5000, 400], device="cuda")[places % 5]
        more["top_p"] = torch.tensor([0.9, 1.0, 0.3], device="cuda")[places % 3]
        more["min_p"] = torch.tensor([0.0, 0.05], device="cuda")[places % 2]

    def run(chosen: Tensor) -> list[Tensor]:
        picked = {k: v[chosen] for k, v in more.items()}
        drawn = ops.draft_sample(logits[chosen], **picked, return_probs=True)
        return [*ops.sample(logits[chosen], **picked), *drawn]

    want = run(places)
    for chosen in (places[:1], places[5:6], places[60:92], places[30:94], places.flip(0)[:40]):
        for got, all_of_them in zip(run(chosen), want, strict=True):
            torch.testing.assert_close(got, all_of_them[chosen], rtol=0, atol=0, equal_nan=True)
    on_the_cpu = ops.sample(*on("cpu", {"logits": logits}).values(), **on("cpu", more))
    for got, on_cpu in zip((want[0], want[2]), (on_the_cpu[0], on_the_cpu[2]), strict=True):
        assert torch.equal(got.cpu()[greedy.cpu()], on_cpu[greedy.cpu()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [3, 100])
def test_top_k_of_rows_with_fewer_values(device: str, dtype: torch.dtype, batch: int) -> None:
    """A GPU reads rows with top-k for maxima alone: where all values stay, nothing differs."""
    g = torch.Generator().manual_seed(batch)
    logits = torch.full((batch, 30000), -torch.inf)
    logits[:, 7000:7020] = torch.randn(batch, 20, generator=g)
    logits[1] = -torch.inf
    case = on(device, {"logits": logits.to(dtype)} | seeds(batch))
    want = ops.draft_sample(**case, return_probs=True)
    got = ops.draft_sample(**case, **filled({"top_k": 50}, batch, device), return_probs=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    # And as the bonus of a chain without drafts, where others look at what reading has left.
    chain = {
        "target": case["logits"],
        "draft_tokens": torch.full((batch, 2), -1, device=device),
        "cu_rows": torch.arange(batch + 1, device=device),
        "seed": case["seed"],
        "position": case["position"],
    }
    plain = ops.spec_verify(**chain)
    for a, b in zip(
        ops.spec_verify(**chain, **filled({"top_k": 50}, batch, device)), plain, strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
    # Many waves, or three that overlap (two if truncated), or one launch for all.
    ("dtype", "batch"),
    [
        (torch.float32, 48),
        (torch.bfloat16, 48),
        (torch.bfloat16, 32),
        (torch.float32, 16),
        (torch.float32, 12),
        (torch.bfloat16, 24),
    ],
)
def test_rows_behind_a_refused_draft_may_be_skipped(
    dtype: torch.dtype, batch: int, truncated: bool
) -> None:
    """Much is read in waves, the later ones for those who got there: as each gets it alone."""
    most, vocab = 7, 128256
    g = torch.Generator(device="cuda").manual_seed(2)
    target = torch.randn(batch * (most + 1), vocab, generator=g, device="cuda").mul(2).to(dtype)
    draft = target.view(batch, most + 1, vocab)[:, :most].clone()
    for b in range(0, batch, 2):  # every other sequence accepts all, the others stop somewhere
        draft[b, b % most :] = draft[b, b % most :].flip(-1)
    drafts = draft.argmax(-1)
    lengths = torch.arange(batch, device="cuda") % (most + 2)
    lengths[lengths == 0] = most + 1
    starts = torch.arange(batch, device="cuda") * (most + 1)
    more = {"temperature": (torch.arange(batch, device="cuda") % 5 != 4).float()}
    more |= on("cuda", seeds(batch))
    if truncated:
        more |= filled({"top_k": 30, "top_p": 0.8}, batch, "cuda")

    def run(chosen: Tensor) -> tuple[Tensor, ...]:
        cu_rows = torch.zeros(len(chosen) + 1, dtype=torch.int64, device="cuda")
        cu_rows[1:] = lengths[chosen].cumsum(0)
        spans = zip(starts[chosen].tolist(), lengths[chosen].tolist(), strict=True)
        rows = torch.cat([torch.arange(first, first + n) for first, n in spans]).cuda()
        picked = {k: v[chosen] for k, v in more.items()}
        return ops.spec_verify(target[rows], drafts[chosen], cu_rows, draft[chosen], **picked)

    everyone = torch.arange(batch, device="cuda")
    want = run(everyone)
    assert want[1].min() == 1 and want[1].max() == most + 1
    for b in range(0, batch, 5):
        for a, all_of_them in zip(run(everyone[b : b + 1]), want, strict=True):
            assert torch.equal(a, all_of_them[b : b + 1])


@pytest.mark.cuda
def test_more_than_2_to_the_32_values() -> None:
    vocab, rows = 128256, 34000
    target = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").fill_(-20.0)
    assert target.numel() > 2**32
    target[-1, 5], target[-2, 128000] = 20.0, 20.0
    tokens, count, _, _ = ops.spec_verify(
        target,
        torch.tensor([[128000]], device="cuda"),
        torch.tensor([rows - 2, rows], device="cuda"),
        **on("cuda", seeds(1)),
    )
    assert tokens.tolist() == [[128000, 5]] and count.tolist() == [2]


def test_mistakes() -> None:
    case = ragged_case(2, 2, 8, torch.float32, 1) | seeds(2)

    def wrong(kind: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(kind, match=message):
            ops.spec_verify(**(case | changes))

    wrong(
        TypeError,
        "target: expected torch.float32.*got torch.float64",
        target=case["target"].double(),
    )
    wrong(
        ValueError, r"target: expected shape \[rows, vocab\], got \[8\]", target=case["target"][0]
    )
    wrong(ValueError, "last stride 1.*got stride", target=torch.rand(8, 9).T)
    wrong(
        TypeError,
        "draft_tokens: expected torch.int64, got torch.int32",
        draft_tokens=case["draft_tokens"].int(),
    )
    wrong(
        ValueError,
        r"cu_rows: expected shape \[num_sequences \+ 1\] = \[3\], got \[2\]",
        cu_rows=torch.tensor([0, 1]),
    )
    wrong(TypeError, "draft: expected the dtype of target", draft=case["draft"].half())
    wrong(ValueError, r"draft: expected shape \[2, 2, draft_vocab\], got", draft=case["draft"][:1])
    wrong(ValueError, "draft_lse: expected with logits", draft_lse=torch.zeros(2, 2))
    wrong(ValueError, "draft_cutoff: expected with draft_lse", draft_cutoff=torch.zeros(2, 2))
    wrong(
        ValueError,
        "target_to_draft: expected with draft",
        draft=None,
        draft_probs=False,
        target_to_draft=torch.zeros(8, dtype=torch.int64),
    )
    wrong(ValueError, "top_k: expected with logits", top_k=torch.ones(2, dtype=torch.int64))
    wrong(TypeError, "temperature: expected torch.float32", temperature=torch.ones(2).double())
    wrong(ValueError, "position: expected together with seed", position=None)
    wrong(ValueError, "got neither", seed=None, position=None)
    wrong(ValueError, "got both", **uniforms(2, 2))
    with pytest.raises(ValueError, match="vocabulary of 1 to 524287, got 600000"):
        ops.sample(torch.zeros(1, 600000), **seeds(1))


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device: str) -> None:
    tokens, count, logprobs, status = ops.spec_verify(
        torch.zeros(0, 10, device=device),
        torch.zeros(0, 3, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        **on(device, seeds(0)),
    )
    assert tokens.shape == logprobs.shape == (0, 4) and count.shape == status.shape == (0,)


def test_philox_is_the_published_one() -> None:
    """The first two words of Random123's known answer for philox4x32-10, counter and key zero."""
    assert ref.philox(0, 0, 0) == 0xE169C58D6627E8D5
