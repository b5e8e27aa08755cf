# SPDX-License-Identifier: MIT
"""Verification of logits against float64: decisions and draws may differ only by rounding.

exp in float32 moves about one draw in fifty at V = 152 000 to a neighbour, so tokens cannot be
compared. Instead: a draft may be judged otherwise than in float64 only if |u·q - p| < 1e-5·p, and
the token drawn must lie in the cumulative distribution where the noise points, up to 1e-5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICES
from test_sampling import on, seeds

from quantgemm import ops
from quantgemm import reference as ref

Tensor = torch.Tensor
TOLERANCE = 1e-5


def law(row: Tensor, heat: float, cutoff: Tensor) -> Tensor:
    """float64 softmax of the values from a cutoff up."""
    x = row.double() / heat
    return x.where(row.float() >= cutoff, -torch.inf).softmax(0)


class Oracle:
    """Judges what an op did with a case; `cutoffs` are those the op itself found (test_sampling
    compares them with float64)."""

    def __init__(self, case: dict[str, Any], cutoffs: Tensor) -> None:
        self.case, self.cutoffs = case, cutoffs

    def p(self, b: int, k: int) -> Tensor:
        row = int(self.case["cu_rows"][b]) + k
        heat = float(self.case["temperature"][b])
        return law(self.case["target"][row], heat, self.cutoffs[row])

    def q(self, b: int, k: int) -> Tensor:
        if self.case.get("draft") is None:
            token = self.case["draft_tokens"][b, k]
            return torch.nn.functional.one_hot(token, self.case["target"].shape[1]).double()
        row, heat = self.case["draft"][b, k], float(self.case["temperature"][b])
        return law(row, heat, self.case["draft_cutoff"][b, k])

    def objection(self, b: int, tokens: list[int], count: int) -> str | None:
        seed, position = int(self.case["seed"][b]), int(self.case["position"][b])
        drafts = self.case["draft_tokens"][b].tolist()
        for k in range(count):
            p = self.p(b, k)
            weights = p
            if k < len(drafts):
                q, d = self.q(b, k), drafts[k]
                u = (ref.philox(seed, position + k, ref.ACCEPT_DOMAIN) >> 40) / 2**24
                close = abs(u * q[d] - p[d]) < TOLERANCE * p[d]
                accepted = k < count - 1
                if accepted and tokens[k] != d:
                    return f"position {k}: emitted {tokens[k]} instead of the draft {d}"
                if accepted != bool(u * q[d] < p[d]) and not close:
                    return f"position {k}: accepted = {accepted}, u·q = {u * q[d]}, p = {p[d]}"
                weights = (p - q).clamp(min=0)
            if k < count - 1:
                continue
            v = ref.philox(seed, position + k, ref.TOKEN_DOMAIN) / 2**64 * float(weights.sum())
            t = tokens[k]
            above = float(weights[: t + 1].sum())
            if not above - float(weights[t]) - TOLERANCE <= v <= above + TOLERANCE:
                return f"position {k}: token {t} covers up to {above}, the noise points to {v}"
            if float(p[t]) == 0 or float(weights[t]) < -TOLERANCE * float(p[t]):
                return f"position {k}: token {t} has no mass"
        return None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [61, 4099, 151936])
@pytest.mark.parametrize("given", ["lse", "rows", "one-hot"])
@pytest.mark.parametrize("truncated", [False, True])
def test_logits_against_float64(
    truncated: bool, given: str, vocab: int, dtype: torch.dtype, device: str
) -> None:
    batch, most = (8 if vocab > 10000 and device == "cpu" else 40), 3
    if (
        vocab > 10000
        and device == "cpu"
        and (truncated or given == "rows")
        and dtype != torch.float32
    ):
        pytest.skip("a few of the large vocabularies; the GPU runs them all")
    g = torch.Generator().manual_seed(vocab)
    target = (torch.randn(batch, most + 1, vocab, generator=g) * 3).to(dtype)
    draft = target[:, :most].float() + 0.5 * torch.randn(batch, most, vocab, generator=g)
    draft = draft.to(dtype)
    heat = torch.rand(batch, generator=g) + 0.5
    settings: dict[str, Tensor] = {"temperature": heat}
    if truncated:
        settings |= {"top_k": torch.full((batch,), 300), "top_p": torch.full((batch,), 0.95)}
        settings |= {"min_p": torch.full((batch,), 1e-3)}
    noise = seeds(batch)

    def sampled(rows: Tensor) -> list[Tensor]:  # [B, n, V]: tokens, lse, cutoff [B, n]
        n = rows.shape[1]
        drawn = ops.draft_sample(
            rows.flatten(0, 1).to(device),
            **{name: x.repeat_interleave(n).to(device) for name, x in settings.items()},
            seed=noise["seed"].repeat_interleave(n).to(device),
            position=(noise["position"][:, None] + torch.arange(n)).flatten().to(device),
        )
        return [x.view(batch, n) for x in drawn[:3]]

    tokens, lse, cutoff = (x.cpu() for x in sampled(draft))
    case: dict[str, Any] = (
        {
            "target": target.flatten(0, 1),
            "draft_tokens": tokens,
            "cu_rows": torch.arange(batch + 1) * (most + 1),
            "draft": None if given == "one-hot" else draft,
            "draft_lse": lse if given == "lse" else None,
            "draft_cutoff": cutoff if given == "lse" else None,
        }
        | settings
        | noise
    )
    got = ops.spec_verify(**on(device, case))
    out, count = got[0].cpu(), got[1].cpu()
    oracle = Oracle(case | {"draft_cutoff": cutoff}, sampled(target)[2].cpu().flatten())
    rows = list(zip(out.tolist(), count.tolist(), strict=True))
    for b, (row, n) in enumerate(rows):
        assert (objection := oracle.objection(b, row, n)) is None, objection
    if given != "one-hot":
        assert 1.2 < count.float().mean() < 4

    # The oracle's teeth: a token moved to one of the other half of the mass.
    noticed = 0
    for b, (row, n) in enumerate(rows):
        moved = list(row)
        order = oracle.p(b, n - 1).argsort(descending=True)
        moved[n - 1] = int(order[0] if int(order[0]) != row[n - 1] else order[1])
        noticed += oracle.objection(b, moved, n) is not None
    assert noticed > 0.8 * batch
