# SPDX-License-Identifier: MIT
"""Every kernel at ragged sizes under compute-sanitizer: memcheck, racecheck, synccheck.

python tests/sanitize.py           all three tools (needs compute-sanitizer on the PATH)
python tests/sanitize.py --cases   the cases themselves, which is what the tools run
python tests/sanitize.py --parts packed --types Q4_0,Q6_K   some of them: packed products of all
                                   types take long, and types can be run side by side
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys

import torch

from quantgemm import _C, SparseKVCache, explain_gemm, kv, ops
from quantgemm.formats import FORMATS, format_by_name

TYPES = list(FORMATS)  # ids of those whose products are run

TOOLS = {
    "memcheck": ["--leak-check", "no"],
    "racecheck": ["--print-limit", "10000"],
    "synccheck": ["--num-cuda-barriers", "4096"],
}

# racecheck takes a bulk copy (sm_90) for a plain write of the lane that started it and does not
# always see that all lanes wait on its mbarrier before they read: warnings that come and go with
# the build.
BULK_COPY = re.compile(
    r"Warning: Race reported between Write access at .*"
    r"dp4a::(few_tokens_kernel|one_slice_kernel|Arrivals::start)"
)


def run_cases(parts: list[str]) -> None:
    """Small tensors in exact-sized allocations: one element too far is outside."""
    for part in parts:
        PARTS[part](torch.Generator().manual_seed(0))
    torch.cuda.synchronize()
    print("cases done")


def run_format_cases(generator: torch.Generator) -> None:
    can_quantize = {row["type_id"] for row in _C.format_table() if row["can_quantize"]}
    for type_id, fmt in FORMATS.items():
        for num_blocks in (1, 3, 4096 // fmt.block_elems + 1):
            shape = (num_blocks * fmt.block_bytes,)
            blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).cuda()
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                ops.dequantize(blocks, type_id, dtype)
            if type_id in can_quantize:
                x = torch.randn(num_blocks * fmt.block_elems, generator=generator)
                ops.quantize(x.cuda(), type_id)
                ops.quantize(x.bfloat16().cuda(), type_id)
                with contextlib.suppress(NotImplementedError):  # a closed form has no weights
                    ops.quantize(x.cuda(), type_id, x.abs().cuda())
    for cols in (32, 96, 2080):
        x = torch.randn(3, cols, generator=generator)
        ops.quantize_activations(x.cuda())
        ops.quantize_activations(x.half().cuda())


def run_layer_steps(generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for cols in (7, 96, 5000):
            x = torch.ones(3, cols, dtype=dtype, device="cuda")
            ops.rms_norm(x, x[0].clone(), 1e-5)
        q = torch.ones(2, 5, 3, 6, dtype=dtype, device="cuda")
        angles = torch.ones(2, 3, 6, dtype=dtype, device="cuda")
        ops.rotary(q, q[:, :1].clone(), angles, angles.clone())


def run_packed_cases(generator: torch.Generator) -> None:
    """Every type with a packed form there and back, and products of ragged sizes."""
    for row in _C.format_table():
        if not row["can_pack"] or row["type_id"] not in TYPES:
            continue
        fmt, block = FORMATS[row["type_id"]], max(32, row["block_elems"])
        sizes = ((1, 37, block), (3, 130, 3 * block), (20, 5, 5 * block), (40, 67, block))
        # The last two: blocks of a cluster share columns, and clusters do.
        for m, n, k in (*sizes, (40, 100, 1024), (60, 40, 8192)):
            # Random bytes hold scales that are no numbers; such rows are computed again one by one.
            w = ops.quantize(torch.randn(n, k, generator=generator), fmt.type_id)
            packed = ops.pack(w.cuda(), fmt.type_id)
            assert torch.equal(ops.unpack(packed, fmt.type_id, n, k).cpu(), w)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                x = torch.randn(m, k, generator=generator).to(dtype).cuda()
                plan = explain_gemm(m, n, k, fmt.type_id, "cuda", dtype, packed=True)
                for algo in plan.available:
                    ops.gemm_packed(x, packed, fmt.type_id, n, k, x.new_zeros(n), algo)
                    norm = x.new_ones(k), 1e-5
                    ops.gemm_packed(x, packed, fmt.type_id, n, k, None, algo, None, *norm)
                    if algo in ("few", "int8"):  # experts have none
                        continue
                    ids = torch.randint(-1, 3, (m, 2), generator=generator).cuda()
                    for some in (ids, ids.repeat(1, 40)):  # grouped by each block, and by a launch
                        args = x, packed.expand(3, -1, -1), fmt.type_id, n, k, some
                        ops.moe_gemm(*args, torch.rand(some.shape).cuda(), algo=algo)


def run_gemm_cases(generator: torch.Generator) -> None:
    """Every rung and type, rows that start anywhere, ragged sizes, a few tokens and a tile."""
    for type_id in TYPES:
        fmt = FORMATS[type_id]
        block = max(32, fmt.block_elems)
        for m, n, k in ((1, 37, block), (3, 130, 3 * block), (8, 5, 5 * block), (70, 67, block)):
            w = torch.randint(0, 256, (n, fmt.row_bytes(k)), dtype=torch.uint8, generator=generator)
            ids = torch.tensor([0, n - 1, n, -1])
            ops.embedding(ids.cuda(), w.cuda(), type_id, torch.bfloat16)
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(m, k, generator=generator).to(dtype).cuda()
                for algo in explain_gemm(m, n, k, type_id, "cuda", dtype).available:
                    ops.gemm(x, in_whole_pieces(w) if "mma" in algo else w.cuda(), type_id, algo)


def in_whole_pieces(w: torch.Tensor) -> torch.Tensor:
    """w in a CUDA allocation that ends at a 16-byte boundary.

    memcheck takes every cp.async for one of 16 bytes, also those told to read fewer.
    """
    room = torch.zeros(-(-w.numel() // 16) * 16, dtype=torch.uint8, device="cuda")
    return room[: w.numel()].view_as(w).copy_(w)


def run_sampling_cases(generator: torch.Generator) -> None:
    """Ragged drafts, greedy and sampled sequences, every kind of draft, one block and several."""
    cu_rows = torch.tensor([0, 4, 5, 7, 10, 12], device="cuda")
    drafts = torch.randint(-1, 40, (5, 3), generator=generator).cuda()
    noise = {"seed": torch.arange(5).cuda(), "position": torch.arange(5).cuda()}
    heat = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0]).cuda()
    for vocab in (1, 37, 1001, 20011):
        for dtype in (torch.float32, torch.bfloat16):
            target = torch.randn(12, vocab, generator=generator).to(dtype).cuda()
            draft = torch.randn(5, 3, vocab, generator=generator).to(dtype).cuda()
            ops.spec_verify(target, drafts, cu_rows, draft, temperature=heat, **noise)
            ops.spec_verify(target.abs(), drafts, cu_rows, None, True, temperature=heat, **noise)
            ops.spec_verify(target.abs(), drafts, cu_rows, draft.abs(), True, True, **noise)
            parents = torch.tensor([-1, -1, 0]).expand(5, -1).contiguous().cuda()
            for mode in ({"parents": parents}, {"block": True}):
                verify = torch.ops.quantgemm.spec_verify
                top_k = torch.full((5,), 10, device="cuda")
                verify(target, drafts, cu_rows, draft, temperature=heat, **noise, **mode)
                verify(target, drafts, cu_rows, None, top_k=top_k, **noise, **mode)
                verify(target.abs(), drafts, cu_rows, draft.abs(), True, True, **noise, **mode)
            for k, p in ((10, 0.9), (0, 0.9), (5000, 1.0)):
                settings = {
                    "top_k": torch.full((5,), k, device="cuda"),
                    "top_p": torch.full((5,), p, device="cuda"),
                }
                ops.spec_verify(target, drafts, cu_rows, draft, **settings, **noise)
                ops.draft_sample(target[:5], **settings, **noise, return_probs=True)
    # Chains read and verified in one launch, some of which stop early.
    order, lengths = torch.arange(12).cuda(), torch.arange(12).cuda() % 4 + 1
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.randn(int(starts[-1]), 20008, generator=generator).to(dtype).cuda()
        draft = target[starts[:-1, None].clamp(max=len(target) - 3) + torch.arange(3).cuda()]
        draft[::3, 1] = draft[::3, 1].flip(-1)
        target[-1, 7] = torch.nan
        chains = (target, draft.argmax(-1), starts)
        heat = (order % 5 != 4).float()
        ops.spec_verify(*chains, draft, temperature=heat, seed=order, position=order)
        ops.spec_verify(*chains, temperature=heat, seed=order, position=order)
    # More rows than are read and ended in one launch.
    rows, many = torch.randn(70, 20011, generator=generator).cuda(), torch.arange(70).cuda()
    for settings in ({}, {"top_k": torch.full((70,), 10, device="cuda")}):
        for logits in (rows, rows.bfloat16()):
            ops.sample(logits, **settings, seed=many, position=many)
    # Enough to be read in waves: three that overlap, two with laws between them, and many.
    for batch, top_k in ((64, None), (64, torch.full((64,), 10)), (120, None)):
        target = torch.randn(batch * 6, 32000, generator=generator).cuda()
        draft = target.view(batch, 6, 32000)[:, :5].contiguous()
        draft[::2, 2] = draft[::2, 2].flip(-1)  # half of the sequences stop there
        order = torch.arange(batch).cuda()
        ops.spec_verify(
            target,
            draft.argmax(-1),
            torch.arange(batch + 1).cuda() * 6,
            draft,
            top_k=None if top_k is None else top_k.cuda(),
            seed=order,
            position=order,
        )


def run_sparse_kv_cases(generator: torch.Generator) -> None:
    """Ragged contexts, all head dimensions and widths, one column and several blocks of them."""
    for heads, groups, n, tokens, dim in (
        (2, 4, 1, 130, 128),
        (1, 3, 7, 1, 64),
        (3, 1, 8, 301, 256),
        (1, 16, 1, 1000, 128),
    ):
        x = torch.randn(heads, tokens, dim, generator=generator)
        for dtype in (torch.float16, torch.bfloat16):
            for bits in (2, 4, 16):
                cache = x.to(dtype).cuda()
                keys = kv.compress_keys(cache, 0.5, bits)
                values = kv.compress_values(cache, 0.7, bits)
                query = torch.randn(heads * groups, n, dim, generator=generator).to(dtype).cuda()
                logits = kv.sparse_key_spmm(
                    query, *keys, num_tokens=tokens, groups=groups, bits=bits
                )
                scores = logits.softmax(-1)
                kv.sparse_value_spmm(scores, *values, head_dim=dim, groups=groups, bits=bits)


def run_kv_cache_cases(generator: torch.Generator) -> None:
    """Sequences of several lengths, pages packed one by one and many at once."""
    for heads, groups, dim, form in (
        (2, 4, 128, "dense2"),
        (1, 9, 64, "dense4"),
        (1, 1, 256, "dense2"),
        (2, 4, 128, "bitmap2"),
        (1, 9, 64, "bitmap4"),
        (1, 1, 256, "bitmap4"),
        (2, 4, 128, "4of8_2"),
        (1, 1, 64, "4of8_4"),
        (2, 4, 128, "dense4/bitmap2"),
        (1, 9, 64, "4of8_4/dense2"),
        (1, 1, 256, "bitmap4/4of8_2"),
    ):
        key, _, value = form.partition("/")
        chosen = {"key_format": key, "value_format": value or key, "max_tokens": 402}
        for dtype in (torch.float16, torch.bfloat16):
            cache = SparseKVCache(
                1, heads, dim, **chosen, window=64, batch=3, device="cuda", dtype=dtype
            )
            x = torch.randn(3, heads, 400, dim, generator=generator).to(dtype).cuda()
            query = torch.randn(3, heads * groups, dim, generator=generator).to(dtype).cuda()
            counts = torch.tensor([400, 0, 195], device="cuda")
            cache.append(0, x, x, counts)
            cache.advance(400, counts)
            for _ in range(2):
                cache.append(0, x[:, :, :1], x[:, :, :1])
                cache.advance(1)
                cache.attend(0, query)
                cache.attend(0, query[:, :, None].repeat(1, 1, 3, 1))
            cache.lens -= 2
            cache.count(-2)
            both = query[:, :, None].repeat(1, 1, 2, 1)
            cache.append_rotated(0, both, x[:, :, 1:3], x[:, :, 1:3], x[:, 0, :2], x[:, 0, 1:3])


PARTS = {
    "formats": run_format_cases,
    "layers": run_layer_steps,
    "gemm": run_gemm_cases,
    "packed": run_packed_cases,
    "sampling": run_sampling_cases,
    "containers": run_sparse_kv_cases,
    "caches": run_kv_cache_cases,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", action="store_true", help="run the kernels, without a tool")
    parser.add_argument("--tools", default=",".join(TOOLS), help="default: %(default)s")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--types", help="of products, default: all")
    options = parser.parse_args()
    if options.types:
        TYPES[:] = [format_by_name(name).type_id for name in options.types.split(",")]
    if options.cases:
        # Without torch's pool every tensor is an allocation of its own.
        run_cases(options.parts.split(","))
        return 0
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    failed = []
    for tool in options.tools.split(","):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *TOOLS[tool]]
        command += [sys.executable, __file__, "--cases", "--parts", options.parts]
        command += ["--types", options.types] if options.types else []
        env_command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *command]
        done = subprocess.run(env_command, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        races = [line for line in lines if "Race reported" in line]
        known = bool(races) and all(BULK_COPY.search(line) for line in races)
        clean = (done.returncode == 0 or known) and "cases done" in done.stdout
        note = f" ({len(races)} bulk copies taken for plain writes)" if known else ""
        print(f"{tool}: {'clean' if clean else 'FAILED'}{note}: {lines[-1] if lines else ''}")
        if not clean:
            failed.append(tool)
            told = [line for line in lines if "Host Frame" not in line]
            print(*told[:80], *done.stderr.strip().splitlines()[:40], sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
