# SPDX-License-Identifier: MIT
"""Speculative sampling: three implementations that agree, what drafts are worth, and how fast.

    python examples/05_speculative_sampling.py

No downloads: the "models" are random tables that give the next token's logits from the last token.
Uses a GPU if there is one. Writes demo/speculative_sampling.png where matplotlib is installed.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import quantgemm
from quantgemm import ops, reference
from quantgemm.sampling import NgramDraft, SamplingConfig, speculative_generate

DEVICE = "cuda" if quantgemm.build_info().cuda and torch.cuda.is_available() else "cpu"
VOCAB, SPEC_LEN = 32000, 5


def verification_case(batch: int) -> dict[str, Any]:
    """Probabilities of a target and of a draft that is nearly right, and drafts drawn from it."""
    torch.manual_seed(batch)
    logits = 3 * torch.randn(batch, SPEC_LEN + 1, VOCAB, device=DEVICE)
    noise = torch.randn(batch, SPEC_LEN, VOCAB, device=DEVICE)
    draft = (logits[:, :SPEC_LEN] + 0.6 * noise).softmax(-1)
    tokens = torch.multinomial(draft.flatten(0, 1), 1).view(batch, SPEC_LEN)
    return {
        "target": logits.softmax(-1).flatten(0, 1),
        "draft_tokens": tokens,
        "cu_rows": torch.arange(batch + 1, device=DEVICE) * (SPEC_LEN + 1),
        "draft": draft,
        "target_probs": True,
        "draft_probs": True,
        "seed": torch.arange(batch, device=DEVICE),
        "position": torch.zeros(batch, dtype=torch.int64, device=DEVICE),
    }


def microseconds(call: Callable[[], Any], repeats: int) -> float:
    def wait() -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    call()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats * 1e6


def show_agreement_and_speed() -> list[tuple[int, float, float, float]]:
    rows = []
    print(f"{DEVICE}, V = {VOCAB}, K = {SPEC_LEN}; µs per call, called from Python")
    print(
        f"{'batch':>5} {'loop':>9} {'vectorised':>10} {'fused':>8}   loop/fused   tokens per step"
    )
    for batch in (1, 4, 16):
        case = verification_case(batch)
        fused = ops.spec_verify(**case)
        loop = reference.rejection_sample_loop(**case)
        vectorized = reference.rejection_sample_vectorized(**case)
        assert torch.equal(fused[0], loop[0]) and torch.equal(fused[0], vectorized[0])
        times = (
            microseconds(partial(reference.rejection_sample_loop, **case), 2),
            microseconds(partial(reference.rejection_sample_vectorized, **case), 5),
            microseconds(partial(ops.spec_verify, **case), 20),
        )
        rows.append((batch, *times))
        print(
            f"{batch:5} {times[0]:9.0f} {times[1]:10.0f} {times[2]:8.0f} "
            f"{times[0] / times[2]:11.1f}x   {fused[1].float().mean():.2f}"
        )
    print("all three gave the same tokens, bit for bit\n")
    return rows


def show_generation() -> None:
    torch.manual_seed(0)
    table = 3 * torch.randn(200, 200, device=DEVICE)
    worse = table + torch.randn(200, 200, device=DEVICE)
    prompt = torch.tensor([1, 2, 3], device=DEVICE)
    for name, draft, config in (
        ("a similar model, temperature 1", lambda ids: worse[ids], SamplingConfig()),
        ("the same, judged as a block", lambda ids: worse[ids], SamplingConfig()),
        ("a similar model, top-k 20", lambda ids: worse[ids], SamplingConfig(top_k=20)),
        ("n-grams, greedy", NgramDraft(), SamplingConfig(temperature=0)),
    ):
        result = speculative_generate(
            lambda ids: table[ids], draft, prompt, 100, 4, config, block="block" in name
        )
        stats = result.statistics
        rates = " ".join(f"{100 * a:.0f}%" for a in stats.acceptance_per_position)
        print(f"{name}: {stats.tokens_per_step:.2f} tokens per target step, accepted {rates}")


def show_modes() -> None:
    """What a step emits from the same laws: drafts in a chain, as a block, and in a tree."""
    batch, vocab = 4000, 50
    torch.manual_seed(1)
    p = (1.5 * torch.randn(vocab, vocab, device=DEVICE)).softmax(
        -1
    )  # the next token's, by the last
    q = (p.log() + torch.randn(vocab, vocab, device=DEVICE)).softmax(-1)
    noise = {
        "seed": torch.arange(batch, device=DEVICE),
        "position": torch.zeros(batch, dtype=torch.int64, device=DEVICE),
    }
    for name, parents, block in (
        ("chain", [-1, 0, 1, 2], False),
        ("block", [-1, 0, 1, 2], True),
        ("tree with two choices at each place", [-1, -1, 0, 0, 2, 2, 4, 4], False),
    ):
        last = [torch.zeros(batch, dtype=torch.int64, device=DEVICE)]
        depths = [0]
        for i, parent in enumerate(parents):
            place, turn = (0, i) if block else (depths[parent + 1], parents[:i].count(parent))
            at = noise | {"position": noise["position"] + place}
            last.append(ops.draft_sample(q[last[parent + 1]].log(), **at, turn=turn)[0])
            depths.append(depths[parent + 1] + 1)
        case: dict[str, Any] = {
            "target": torch.stack([p[t] for t in last], 1).flatten(0, 1),
            "draft_tokens": torch.stack(last[1:], 1),
            "cu_rows": torch.arange(batch + 1, device=DEVICE) * len(last),
            "draft": torch.stack([q[last[parent + 1]] for parent in parents], 1),
            "target_probs": True,
            "draft_probs": True,
        } | noise
        if name.startswith("tree"):
            rows = torch.tensor(parents, device=DEVICE).expand(batch, -1)
            count = ops.spec_verify_tree(**case, parents=rows)[1]
        else:
            count = ops.spec_verify(**case, block=block)[1]
        print(f"{name}: {len(parents)} drafts, {count.float().mean():.2f} tokens per step")
    print()


def draw_chart(rows: list[tuple[int, float, float, float]]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no chart: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path("demo") / "speculative_sampling.png"
    path.parent.mkdir(exist_ok=True)
    for column, name in enumerate(("Python loop", "vectorised PyTorch", "fused op"), 1):
        pyplot.plot([r[0] for r in rows], [r[column] for r in rows], marker="o", label=name)
    pyplot.xscale("log", base=2)
    pyplot.yscale("log")
    pyplot.xlabel("sequences")
    pyplot.ylabel("µs per call")
    pyplot.legend()
    pyplot.savefig(path)
    print(f"chart: {path}")


def main() -> None:
    rows = show_agreement_and_speed()
    show_modes()
    show_generation()
    draw_chart(rows)


if __name__ == "__main__":
    main()
