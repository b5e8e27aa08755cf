# SPDX-License-Identifier: MIT
"""Everything in one look: exact decoding, products on blocks, drafts verified, a small cache.

    python examples/quick_demo.py

No downloads, less than half a minute on two cores; uses a GPU if there is one. Each part checks its
own claim against plain PyTorch and prints what it found.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import quantgemm
from quantgemm import QType, QuantLinear, SparseKVCache, ops, reference

DEVICE = "cuda" if quantgemm.build_info().cuda and torch.cuda.is_available() else "cpu"
TYPES = ("Q4_0", "Q4_K", "Q6_K", "Q8_0")


def milliseconds(call: Callable[[], object], least: int = 5) -> float:
    """Of the fastest call."""
    times = []
    for _ in range(least + 1):
        start = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def check(claim: str, holds: bool) -> None:
    print(f"  {'yes' if holds else 'NO '}  {claim}")
    if not holds:
        raise SystemExit("a check failed")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def decoding() -> None:
    print("1. Rows of a GGUF file become tensors, bit for bit")
    weights = torch.randn(256, 4096, device=DEVICE) / 64
    for name in TYPES:
        fmt = quantgemm.formats.format_by_name(name)
        blocks = ops.quantize(weights, fmt.type_id)
        ours = ops.dequantize(blocks, fmt.type_id)
        numpy = torch.from_numpy(fmt.decode(blocks.cpu().numpy()))
        equal = torch.equal(ours.cpu(), numpy)
        error = relative(ours, weights)
        check(f"{name}: equal to the numpy decoder; quantising lost {100 * error:.2f} %", equal)


def products() -> None:
    print("\n2. Products run on the blocks; no decoded matrix exists")
    linear = torch.nn.Linear(4096, 4096, bias=False, device=DEVICE)
    print(f"  {'':6}{'bytes':>12}{'one token':>12}{'nn.Linear':>12}{'error':>11}{'int8':>11}")
    x = torch.randn(1, 4096, device=DEVICE)
    with torch.no_grad():
        for name in TYPES:
            layer = QuantLinear.from_linear(linear, name)
            want = x.double() @ layer.dequantize().double().T
            exact = relative(layer(x), want)
            rounded = relative(ops.gemm(x, layer.weight, layer.qtype, "dp4a"), want)
            mine, theirs = milliseconds(lambda w=layer: w(x)), milliseconds(lambda: linear(x))
            print(
                f"  {name:6}{layer.nbytes:12,}{mine:9.3f} ms{theirs:9.3f} ms"
                f"{exact:11.1e}{rounded:11.1e}"
            )
            check("exact products within float32's rounding, int8 activations within 1 %",
                  exact < 1e-6 and rounded < 1e-2)  # fmt: skip


def drafts() -> None:
    print("\n3. A speculative decoder's drafts are verified in one call")
    batch, spec_len, vocab = 4, 5, 4096
    target = (3 * torch.randn(batch * (spec_len + 1), vocab, device=DEVICE)).softmax(-1)
    draft = torch.randn(batch, spec_len, vocab, device=DEVICE).softmax(-1)
    draft = 0.3 * draft + 0.7 * target.view(batch, -1, vocab)[:, :-1]
    case = {
        "target": target,
        "draft_tokens": torch.multinomial(draft.flatten(0, 1), 1).view(batch, spec_len),
        "cu_rows": torch.arange(batch + 1, device=DEVICE) * (spec_len + 1),
        "draft": draft,
        "target_probs": True,
        "draft_probs": True,
        "seed": torch.arange(batch, device=DEVICE),
        "position": torch.zeros(batch, dtype=torch.int64, device=DEVICE),
    }
    fused, loop = ops.spec_verify(**case), reference.rejection_sample_loop(**case)
    same = torch.equal(fused[0].cpu(), loop[0].cpu())
    check("the fused kernel and the Python loop emit the same tokens", same)
    fast = milliseconds(lambda: ops.spec_verify(**case))
    slow = milliseconds(lambda: reference.rejection_sample_loop(**case), 1)
    print(f"  {fast:.3f} ms against {slow:.1f} ms: {slow / fast:.0f} times as fast")


def cache() -> None:
    print("\n4. Keys and values of attention in 2 or 4 bits")
    heads, groups, tokens, dim = 4, 4, 2048, 128
    dtype = torch.float16
    k, v = (torch.randn(1, heads, tokens, dim, device=DEVICE).to(dtype) for _ in range(2))
    query = torch.randn(1, heads * groups, dim, device=DEVICE).to(dtype)
    wide = [t.float().repeat_interleave(groups, 1) for t in (k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(query.float()[:, :, None], *wide)[
        :, :, 0
    ]
    for kind in ("dense4", "dense2"):
        kept = SparseKVCache(1, heads, dim, kind, max_tokens=tokens, device=DEVICE, dtype=dtype)
        kept.append(0, k, v)
        kept.advance(tokens)
        out, _ = kept.attend(0, query)
        error, size = relative(out.float(), want), kept.num_bytes / (k.nbytes + v.nbytes)
        check(f"{kind}: {100 * size:.0f} % of float16's bytes, error {100 * error:.0f} % on noise, "
              "which is the hardest", error < (0.3 if kind == "dense4" else 0.8))  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    start = time.perf_counter()
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"quantgemm {quantgemm.__version__}, torch {torch.__version__}, {where}\n")
    decoding()
    products()
    drafts()
    cache()
    print(
        f"\n{QType.Q4_K.name} and {len(quantgemm.formats.FORMATS) - 1} more types: `quantgemm env`."
    )
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
