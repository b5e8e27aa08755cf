# SPDX-License-Identifier: MIT
"""Every op as torch expects it: opcheck, fullgraph compilation, CUDA graphs, streams, devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICES, random_blocks

import quantgemm
from quantgemm.formats import FORMATS, QType

Q = torch.ops.quantgemm


def op_cases(device: str) -> dict[str, tuple[Callable, tuple]]:
    fmt = FORMATS[QType.Q5_K]
    blocks = torch.from_numpy(random_blocks(fmt, 6, 512)).to(device)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(device)
    weights = torch.rand(256, generator=torch.Generator().manual_seed(1)).to(device)
    return {
        "dequantize": (Q.dequantize.default, (blocks, fmt.type_id, torch.bfloat16)),
        "quantize": (Q.quantize.default, (x, int(QType.Q8_0), None)),
        "quantize with importance": (Q.quantize.default, (x, int(QType.Q4_K), weights)),
        "quantize_activations": (Q.quantize_activations.default, (x.half(),)),
        **product_cases(device),
        **sampling_cases(device),
        **sparse_kv_cases(device),
    }


def product_cases(device: str) -> dict[str, tuple[Callable, tuple]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 7, 512, generator=generator).to(device)
    ids = torch.randint(0, 9, (2, 5), generator=generator).to(device)
    w = Q.quantize(torch.randn(9, 512, generator=generator), int(QType.Q4_K)).to(device)
    packed = Q.pack(w, int(QType.Q4_K))
    other = Q.pack(w.flip(0), int(QType.Q4_K))
    routes = (
        torch.randint(-1, 1, (3, 7), generator=generator).to(device),
        torch.rand(3, 7).to(device),
    )
    weights = torch.randn(9, 512, generator=generator).to(device)
    return {
        "gemm": (Q.gemm.default, (x, w, int(QType.Q4_K), "auto")),
        "gemm in half": (Q.gemm.default, (x.half(), w, int(QType.Q4_K), "auto")),
        "gemm of one token": (Q.gemm.default, (x[:1, :1].clone(), w, int(QType.Q4_K), "auto")),
        "gemm with int8 activations": (
            Q.gemm.default,
            (x.bfloat16(), w, int(QType.Q4_K), "auto_q8"),
        ),
        "pack": (Q.pack.default, (w, int(QType.Q4_K))),
        "unpack": (Q.unpack.default, (packed, int(QType.Q4_K), 9, 512)),
        "gemm_packed": (
            Q.gemm_packed.default,
            (x.half(), packed, int(QType.Q4_K), 9, 512, weights[:, 0].half(), "auto"),
        ),
        "gemm_packed of few tokens": (
            Q.gemm_packed.default,
            (x[0], packed, int(QType.Q4_K), 9, 512, None, "auto"),
        ),
        "moe_gemm": (
            Q.moe_gemm.default,
            (x[:, 0].half(), packed[None], int(QType.Q4_K), 9, 512, routes[0], None, None, "auto"),
        ),
        "moe_gemm with weights": (
            Q.moe_gemm.default,
            (
                x,
                packed[None],
                int(QType.Q4_K),
                9,
                512,
                *routes,
                weights[None, :, 0].clone(),
                "auto",
            ),
        ),
        "moe_gemm gated": (
            Q.moe_gemm.default,
            (x, packed[None], int(QType.Q4_K), 9, 512, *routes, None, "auto", other[None]),
        ),
        "gemm_packed with a residual": (
            Q.gemm_packed.default,
            (x, packed, int(QType.Q4_K), 9, 512, None, "auto", weights[:7, :9].repeat(3, 1, 1)),
        ),
        "gemm_packed with a norm": (
            Q.gemm_packed.default,
            (
                x[0, :3].half(),
                *(packed, int(QType.Q4_K), 9, 512, None, "auto", None),
                *(weights[0].half(), 1e-5),
            ),
        ),
        "gemm_packed_gated with a norm": (
            Q.gemm_packed_gated.default,
            (
                x.half(),
                *(packed, other, int(QType.Q4_K), 9, 512, "auto"),
                *(weights[0].half(), 1e-5),
            ),
        ),
        "gemm_packed_pair": (
            Q.gemm_packed_pair.default,
            (x[0].half(), packed, int(QType.Q4_K), 9, other, int(QType.Q4_K), 9, 512),
        ),
        "gemm_packed_pair with a norm": (
            Q.gemm_packed_pair.default,
            (
                *(x[0].bfloat16(), packed, int(QType.Q4_K), 9, other, int(QType.Q4_K), 9, 512),
                *("auto", weights[0].bfloat16(), 1e-5),
            ),
        ),
        "gemm_packed_gated": (
            Q.gemm_packed_gated.default,
            (x[0].half(), packed, other, int(QType.Q4_K), 9, 512, "auto"),
        ),
        "gemm_packed_gated of many": (
            Q.gemm_packed_gated.default,
            (x.half(), packed, other, int(QType.Q4_K), 9, 512, "auto"),
        ),
        "gemm_fp32": (Q.gemm_fp32.default, (x, weights, "tiled")),
        "rms_norm": (Q.rms_norm.default, (x, weights[0], 1e-5)),
        "rotary": (
            Q.rotary.default,
            (
                weights.view(1, 9, 8, 64),
                weights[:8].view(1, 8, 8, 64),
                *[weights[:1].view(1, 8, 64)] * 2,
            ),
        ),
        "embedding": (Q.embedding.default, (ids, w, int(QType.Q4_K), torch.float16)),
    }


def sampling_cases(device: str) -> dict[str, tuple[Callable, tuple]]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(12, 5000, generator=generator).to(device)
    draft = torch.randn(4, 2, 5000, generator=generator).to(device)
    cu_rows = torch.tensor([0, 3, 4, 6, 9], device=device)
    drafts = torch.randint(0, 5000, (4, 2), generator=generator).to(device)
    heat = torch.tensor([1.0, 0.0, 0.5, 2.0], device=device)
    top_k = torch.tensor([0, 5, 50, 2000], device=device)
    top_p = torch.tensor([0.9, 1.0, 0.5, 0.9], device=device)
    seed, position = torch.arange(4, device=device), torch.arange(4, device=device)
    noise = (seed, position, None)
    verify, rows = Q.spec_verify.default, (drafts, cu_rows)
    options = (False, False, None, None, None, heat, top_k, top_p, None)
    probs = (True, True, None, None, None, None, None, None, None)
    return {
        "spec_verify logits": (verify, (logits, *rows, draft, *options, *noise)),
        "spec_verify probabilities": (
            verify,
            (logits.softmax(-1), *rows, draft.softmax(-1), *probs, *noise),
        ),
        "spec_verify tree": (
            verify,
            (logits, *rows, draft, *options, *noise, torch.tensor([[-1, -1]] * 4, device=device)),
        ),
        "spec_verify block": (verify, (logits, *rows, draft, *options, *noise, None, True)),
        "sample": (Q.sample.default, (logits[:4], heat, top_k, top_p, None, *noise)),
        "draft_sample": (
            Q.draft_sample.default,
            (logits[:4], heat, top_k, None, None, *noise, True),
        ),
    }


def sparse_kv_cases(device: str) -> dict[str, tuple[Callable, tuple]]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 301, 128, generator=generator).half().to(device)
    query = torch.randn(8, 1, 128, generator=generator).half().to(device)
    scores = torch.rand(8, 2, 301, generator=generator).half().to(device)
    keys = Q.sparse_kv_compress(x, 2, 64, False)[:5]
    values = Q.sparse_kv_compress(x, 4, 128, True)[:5]
    plain = (*Q.sparse_kv_compress(x, 16, 40, False)[:3], None, None)
    return {
        "sparse_kv_compress": (Q.sparse_kv_compress.default, (x, 2, 64, False)),
        "sparse_kv_compress values": (Q.sparse_kv_compress.default, (x, 4, 128, True)),
        "sparse_kv_compress raw": (Q.sparse_kv_compress.default, (x, 16, 40, True)),
        "sparse_key_spmm": (Q.sparse_key_spmm.default, (query, *keys, 301, 4, 2)),
        "sparse_key_spmm raw": (Q.sparse_key_spmm.default, (query, *plain, 301, 4, 16)),
        "sparse_value_spmm": (Q.sparse_value_spmm.default, (scores, *values, 128, 4, 4)),
        **kv_cache_cases(device),
    }


def kv_cache_cases(device: str) -> dict[str, tuple[Callable, tuple]]:
    cases = {}
    for name, keys, values in (
        ("", "dense2", "dense2"),
        (" bitmap", "bitmap2", "bitmap2"),
        (" four of eight", "4of8_4", "4of8_4"),
        (" mixed", "dense4", "bitmap2"),
    ):
        generator = torch.Generator().manual_seed(5)
        centre = name == " bitmap"
        chosen = {"key_format": keys, "value_format": values, "centre": centre}
        cache = quantgemm.SparseKVCache(1, 2, 64, **chosen, max_tokens=500, batch=2, device=device)
        new = torch.randn(2, 2, 300, 64, generator=generator).half().to(device)
        query = torch.randn(2, 8, 64, generator=generator).half().to(device)
        stored = (cache.key_pages[0], cache.value_pages[0], cache.page_table)
        recent = (cache.recent_keys[0], cache.recent_values[0])
        means = None if cache.means is None else cache.means[0]
        one = new[:, :, :1].clone()
        before = cache.lens.clone()
        settings = (4, 128, keys, values, 32)
        append = (one, one, *stored, *recent, before, means, None, *settings)
        cache.append(0, new, new)
        cache.advance(300)
        attend = (query, *stored, *recent, cache.lens, means, *settings, 0.125)
        cases["sparse_kv_append" + name] = (Q.sparse_kv_append.default, append)
        angles = torch.randn(2, 1, 1, 64, generator=generator).half().to(device)
        rotated = (query[:, :, None], one, one, *angles, *stored, *recent, before, means, *settings)
        cases["sparse_kv_append_rotated" + name] = (Q.sparse_kv_append_rotated.default, rotated)
        cases["sparse_kv_attention" + name] = (Q.sparse_kv_attention.default, attend)
    return cases


def outputs(result: torch.Tensor | tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, ...]:
    if result is None:  # the op writes to its arguments
        return ()
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def assert_same_bytes(got: Any, want: Any) -> None:
    for a, b in zip(outputs(got), outputs(want), strict=True):
        assert torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


CASES = list(op_cases("cpu"))


def test_every_op_has_a_case() -> None:
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("quantgemm::")
    }
    assert registered == {name.split()[0] for name in CASES}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, device: str) -> None:
    op, args = op_cases(device)[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_a_break(name: str, device: str) -> None:
    op, args = op_cases(device)[name]
    torch._dynamo.reset()  # each case is a program of its own, not a recompilation of the last
    backend = "inductor" if device == "cuda" else "aot_eager"  # no C++ compilation on the CPU
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend=backend)
    assert_same_bytes(compiled(*args), op(*args))


@pytest.mark.parametrize("name", CASES)
def test_meta_tensors(name: str) -> None:
    op, args = op_cases("cpu")[name]
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    for got, want in zip(outputs(op(*on_meta)), outputs(op(*args)), strict=True):
        assert got.is_meta and got.shape == want.shape and got.dtype == want.dtype


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_cuda_graph(name: str) -> None:
    """Captured once, replayed with other data in the same place."""
    op, args = op_cases("cuda")[name]
    op(*args)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(*args)
    args[0].copy_(args[0].flip(0))
    want = op(*args)
    for tensor in outputs(out):
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bytes(out, want)


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_runs_on_the_current_stream(name: str) -> None:
    """Work queued on a side stream is seen by an op called there without synchronising."""
    op, args = op_cases("cuda")[name]
    want = op(*args)
    stream, delayed = torch.cuda.Stream(), torch.zeros_like(args[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        delayed.copy_(args[0])
        got = op(delayed, *args[1:])
    stream.synchronize()
    assert_same_bytes(got, want)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", CASES)
def test_other_device_than_the_current_one(name: str) -> None:
    op, args = op_cases("cuda:1")[name]
    want = op(*[a.to("cuda:0") if isinstance(a, torch.Tensor) else a for a in args])
    got = op(*args)
    assert all(tensor.device.index == 1 for tensor in outputs(got))
    assert_same_bytes(got, want)


@pytest.mark.skipif(quantgemm.build_info().cuda is not None, reason="this build has CUDA kernels")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cpu_only_build_says_so() -> None:
    with pytest.raises(NotImplementedError, match="no CUDA kernels"):
        Q.dequantize(torch.zeros(18, dtype=torch.uint8, device="cuda"), 2)
