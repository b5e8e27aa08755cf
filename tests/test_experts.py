# SPDX-License-Identifier: MIT
"""QuantExperts: stacks of experts beside torch on the decoded weights, whole mixtures through
load_model, and the steps that compile_decode records of them."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICES
from torch.nn.functional import silu

from quantgemm import QuantExpertLinear, QuantExperts, ops, save_gguf
from quantgemm.experts import ExpertLinear
from quantgemm.formats import QType
from quantgemm.gguf import open_gguf

on_devices = pytest.mark.parametrize("device", DEVICES)
EXPERTS, HIDDEN, INNER, TOP = 5, 256, 96, 2


def stack(qtype: str, n: int, k: int, device: str = "cpu", seed: int = 0) -> QuantExpertLinear:
    generator = torch.Generator().manual_seed(seed)
    numbers = 0.1 * torch.randn(EXPERTS, n, k, generator=generator)
    if qtype == "IQ2_S":  # nobody quantises to it here: any bytes with finite scales
        blocks = torch.randint(0, 48, (EXPERTS, n, k // 256 * 82), generator=generator)
        return QuantExpertLinear.from_blocks(blocks.byte().to(device), qtype)
    return QuantExpertLinear.from_blocks(ops.quantize(numbers, QType[qtype]).to(device), qtype)


def mixture(device: str = "cpu", down: str = "Q5_0") -> QuantExperts:
    gate, up = (stack("Q4_K", INNER, HIDDEN, device, seed) for seed in (1, 2))
    return QuantExperts(gate, up, stack(down, HIDDEN, INNER, device, 3))


def routed(tokens: int, device: str, seed: int = 4) -> tuple[torch.Tensor, ...]:
    """x, ids and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP).indices
    weights = torch.rand(tokens, TOP, generator=generator)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    return x.to(device), ids.to(device), weights.to(device)


def reference(
    experts: QuantExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    gate, up, down = (
        s.dequantize().double() if isinstance(s, QuantExpertLinear) else s.weight.double()
        for s in (experts.gate_proj, experts.up_proj, experts.down_proj)
    )
    first, second = (torch.einsum("tk,tjnk->tjn", x.double(), w[ids]) for w in (gate, up))
    y = torch.einsum("tjn,tjkn->tjk", silu(first) * second, down[ids])
    return (y * weights.double()[..., None]).sum(1)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert ((got.double() - want).abs().max() <= tolerance * want.abs().max()).item()


# ------------------------------------------------------------------------------ layers


@on_devices
@pytest.mark.parametrize("qtype", ["Q4_0", "Q6_K", "IQ2_S"])
def test_stack(qtype: str, device: str) -> None:
    """Rows and packed, a row of x for a token or for each pair, ids that are none, no tokens."""
    n = 64 if qtype == "Q4_0" else 40
    for packed, tokens in itertools.product((False, qtype != "IQ2_S"), (0, 1, 50)):
        experts = stack(qtype, n, HIDDEN, device)
        decoded = experts.dequantize().double()
        if packed:
            before = experts.weight.clone()
            assert torch.equal(experts.pack().blocks, before) and experts.is_packed
        x, ids, weights = routed(tokens, device)
        want = torch.einsum("tk,tjnk->tjn", x.double(), decoded[ids])
        with torch.no_grad():
            got = experts(x, ids)
            assert got.shape == (tokens, TOP, n)
            if tokens:
                assert_close(got, want)
                each = x[:, None] * torch.tensor([1.0, 2.0], device=device)[:, None]
                assert_close(experts(each, ids.int()), want * torch.tensor([[1], [2]]).to(device))
                ids[0, 0], ids[-1, -1] = -1, EXPERTS
                y = experts(x, ids, weights)
                assert (y[0, 0] == 0).all() and (y[-1, -1] == 0).all()
                known = (ids >= 0) & (ids < EXPERTS)
                if known.any():
                    assert_close(y[known], (want * weights[..., None])[known])


@on_devices
@pytest.mark.parametrize("down", ["Q5_0", "number", "IQ4_NL"])
def test_mixture(down: str, device: str) -> None:
    for packed, tokens in itertools.product((False, True), (1, 9, 70)):
        experts = mixture(device, "Q5_0" if down == "number" else down)
        if down == "number":
            experts.down_proj = ExpertLinear(EXPERTS, INNER, HIDDEN, device)
            torch.nn.init.normal_(experts.down_proj.weight)
        if packed:
            experts.pack()
        x, ids, weights = routed(tokens, device)
        want = reference(experts, x, ids, weights)
        with torch.no_grad():
            assert_close(experts(x, ids, weights), want)
            experts.to(torch.bfloat16)
            if packed:
                experts.pack()  # a move on the CPU unpacks
            half = experts(x.bfloat16(), ids, weights.bfloat16())
        assert half.dtype == torch.bfloat16
        assert_close(half, want, 0.03)


@on_devices
def test_two_types_as_gate_and_up(device: str) -> None:
    experts = mixture(device)
    experts.up_proj = stack("Q6_K", INNER, HIDDEN, device, 8)
    x, ids, weights = routed(6, device)
    with torch.no_grad():
        want = reference(experts, x, ids, weights)
        assert_close(experts.pack()(x, ids, weights), want)


def test_routes_that_do_not_fit() -> None:
    rows = mixture("cpu").gate_proj
    x, ids, weights = routed(6, "cpu")
    with pytest.raises(TypeError, match="ids: expected int32 or int64"):
        rows(x, ids.float())
    with pytest.raises(ValueError, match=r"ids: expected \[tokens, top\], got \[6\]"):
        rows(x, ids[:, 0])
    with pytest.raises(ValueError, match=r"x: expected \[5, k\] or \[5, "):
        rows(x, ids[:5])
    with pytest.raises(ValueError, match="weights: expected"):
        rows(x, ids, weights[:5])


@on_devices
def test_gradients(device: str) -> None:
    """To tokens and to the router, from rows and from packed ones alike."""
    x, ids, weights = routed(7, device)
    grads = []
    for experts in (mixture(device), mixture(device).pack()):
        a, b = x.clone().requires_grad_(), weights.clone().requires_grad_()
        experts(a, ids, b).square().sum().backward()
        grads.append((a.grad, b.grad))
    a, b = x.double().requires_grad_(), weights.double().requires_grad_()
    reference(mixture(device), a, ids, b).square().sum().backward()
    for got in grads:
        for mine, want in zip(got, (a.grad, b.grad), strict=True):
            assert mine is not None and want is not None
            assert_close(mine, want, 1e-4)


@on_devices
def test_checkpoints_hold_the_rows(device: str) -> None:
    experts = mixture(device)
    plain = {name: value.clone() for name, value in experts.state_dict().items()}
    assert plain["gate_proj.weight"].shape == (EXPERTS, INNER, HIDDEN // 256 * 144)
    state = experts.pack().state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    other = mixture(device).pack()
    other.gate_proj.weight.data.zero_()
    other.load_state_dict(plain)
    assert all(torch.equal(value, plain[name]) for name, value in other.state_dict().items())
    on_cpu = copy.deepcopy(other).to("cpu")
    assert not any(getattr(s, "is_packed", False) for s in on_cpu.children())
    assert torch.equal(on_cpu.down_proj.weight, plain["down_proj.weight"].cpu())
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    third = mixture(device)
    third.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(third.up_proj.weight, plain["up_proj.weight"])


def test_no_pieces_for_the_compiler() -> None:
    experts = mixture().pack()
    x, ids, weights = routed(5, "cpu")
    with torch.no_grad():
        compiled = torch.compile(experts, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, ids, weights), experts(x, ids, weights))


@on_devices
def test_autocast(device: str) -> None:
    x, ids, weights = routed(5, device)
    for experts in (mixture(device), mixture(device).pack()):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            got = experts(x, ids, weights)
        assert_close(got, reference(experts, x, ids, weights), 0.03)


@pytest.mark.cuda
@pytest.mark.parametrize("qtype", ["Q4_K", "IQ2_S"])
def test_graph(qtype: str) -> None:
    """Packed experts of any number of tokens, and a few tokens of those that cannot be packed."""
    gate, up = (stack(qtype, INNER, HIDDEN, "cuda", seed) for seed in (1, 2))
    experts = QuantExperts(gate, up, stack("Q5_0", HIDDEN, INNER, "cuda", 3)).pack()
    x, ids, weights = (t.cuda() for t in routed(70 if qtype == "Q4_K" else 3, "cuda"))
    with torch.no_grad():
        experts(x, ids, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = experts(x, ids, weights)
        for seed in (5, 6):
            for old, new in zip((x, ids, weights), routed(len(x), "cuda", seed), strict=True):
                old.copy_(new)
            graph.replay()
            assert_close(y, reference(experts, x, ids, weights))


def test_of_a_file_and_errors(tmp_path: Path) -> None:
    source = mixture()
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    tensors: dict[str, Any] = {
        f"blk.0.ffn_{names[name]}_exps.weight": (s.weight, s.format.name)
        for name, s in source.named_children()
        if isinstance(s, QuantExpertLinear)
    }
    tensors["flat"] = torch.zeros(4, 32)
    save_gguf(tmp_path / "m.gguf", tensors)
    found = open_gguf(tmp_path / "m.gguf").tensors
    parts = [found[f"blk.0.ffn_{name}_exps.weight"] for name in names.values()]
    experts = QuantExperts.from_gguf(*parts)
    gate = experts.gate_proj
    assert isinstance(gate, QuantExpertLinear)
    assert gate.weight_shape == parts[0].shape and gate.nbytes == parts[0].nbytes
    assert gate.weight.data_ptr() == parts[0].blocks.data_ptr()  # the mapped file
    x, ids, weights = routed(3, "cpu")
    with torch.no_grad():
        assert torch.equal(experts(x, ids, weights), source(x, ids, weights))
    assert "experts=5, in_features=256, out_features=96, Q4_K" in repr(experts)
    assert gate.explain(4, 2).m == 1 and gate.explain(100, 2).m == 40

    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, r"tensor: expected three dimensions .* got 'flat' of shape \[4, 32\]",
         lambda: QuantExpertLinear.from_gguf(found["flat"])),
        (ValueError, r"blocks: expected \[experts, rows, row_bytes\], got shape \[96, 144\]",
         lambda: QuantExpertLinear.from_blocks(gate.weight[0], "Q4_K")),
        (TypeError, "blocks: expected torch.uint8, got torch.float32",
         lambda: QuantExpertLinear.from_blocks(gate.weight.float(), "Q4_K")),
        (ValueError, "experts: expected at least 1, got 0",
         lambda: QuantExpertLinear(0, 256, 64, "Q4_K")),
        (ValueError, "in_features: 100 is not a multiple of the 256-weight Q4_K block",
         lambda: QuantExpertLinear(2, 100, 64, "Q4_K")),
        (ValueError, r"up_proj: expected \[5, 96, 256\] as gate_proj, got \[5, 256, 96\]",
         lambda: QuantExperts(gate, source.down_proj, source.down_proj)),  # type: ignore[arg-type]
        (ValueError, r"down_proj: expected \[5, 256, 96\], got \[5, 96, 256\]",
         lambda: QuantExperts(gate, gate, gate)),
        (NotImplementedError, "packed: IQ2_S has no packed form",
         lambda: stack("IQ2_S", 32, 256).pack()),
        (RuntimeError, r"gate_proj.weight_type: expected 12 \(Q4_K\), got 14 \(Q6_K\)",
         lambda: source.load_state_dict(
             source.state_dict() | {"gate_proj.weight_type": torch.tensor(14)})),
        (RuntimeError, r"gate_proj.weight: expected \[5, 96, 144\], rows .*, got \[4, 96, 144\]",
         lambda: source.load_state_dict(
             source.state_dict() | {"gate_proj.weight": gate.weight[1:]})),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


# ------------------------------------------------------------------------------ whole models


@on_devices
@pytest.mark.parametrize("case", ["qwen3moe", "qwen2moe", "mixtral"])
def test_recorded_steps(case: str, device: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("gguf", reason="PyPI gguf, which knows the names, is not installed")
    from tiny_models import make, write

    from quantgemm import load_model
    from quantgemm.models import compile_decode
    from quantgemm.sampling import SamplingConfig

    source = make(case, head_dim=64, hidden_size=256)  # 4 heads of 64
    path = write(tmp_path / "m.gguf", source, case, "Q8_0")
    dtype = torch.bfloat16
    model = load_model(path, device, dtype, progress=False, packed=device == "cpu" or None)
    stacks = [m for m in model.modules() if isinstance(m, QuantExpertLinear)]
    assert len(stacks) == 9 and all(s.is_packed for s in stacks)
    ids = torch.randint(3, 96, (2, 30), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        want = model(ids).logits
    decoder = compile_decode(model, max_tokens=64)
    got = [decoder.read(ids[:, :10]).clone()]
    got += [decoder.step(ids[:, i]).clone() for i in range(10, 30)]
    # A router's close call falls one way or the other with a rounding: most tokens, not all.
    near = [
        float((row - want[:, 9 + i]).float().norm() / want[:, 9 + i].float().norm()) < 0.05
        for i, row in enumerate(got)
    ]
    assert sum(near) >= 0.7 * len(near), near
    greedy = SamplingConfig(temperature=0)
    text = decoder.generate(ids[:1], 20, greedy, ())[0]
    plain = model.generate(ids[:1], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert text[:3] == plain[0, 30:33].tolist()
    assert decoder.generate(ids[:1], 20, greedy, ())[0] == text
