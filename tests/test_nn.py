# SPDX-License-Identifier: MIT
"""QuantLinear and QuantEmbedding beside torch's own layers on the decoded weights, replace_linear,
and what other code does to modules: casts, copies, checkpoints, offloading, compilation."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICES
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import quantgemm
from quantgemm import QType, QuantEmbedding, QuantLinear, explain_gemm, ops, replace_linear

Q = torch.ops.quantgemm
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
TYPES = ["Q4_0", "Q4_K", "Q6_K", "NVFP4", "F16"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(qtype: str, n: int, k: int) -> torch.Tensor:
    weights = random(n, k, seed=1)
    if qtype == "F16":
        return weights.half().view(torch.uint8)
    return ops.quantize(weights, QType[qtype])


def quant_linear(qtype: str = "Q4_K", n: int = 24, k: int = 256, **options: Any) -> QuantLinear:
    bias = random(n, seed=2) if options.pop("bias", True) else None
    return QuantLinear.from_blocks(rows_of(qtype, n, k), qtype, bias, **options)


def twin(layer: QuantLinear, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """torch's layer on the same numbers."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.weight.data = layer.dequantize()
    if layer.bias is not None:
        linear.bias.data = layer.bias.data.float()
    return linear.to(layer.weight.device, dtype)


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Relative to the largest value; NaN never passes."""
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max()
    assert error <= ROUNDING[dtype or got.dtype] * want.double().abs().max()


def small_mlp(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))


def quant_mlp() -> nn.Module:
    return replace_linear(small_mlp(), "Q8_0")[0]


# ------------------------------------------------------------------------------ ops.gemm


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("qtype", TYPES)
def test_forward_and_gradients_beside_a_decoded_twin(
    qtype: str, dtype: torch.dtype, device: str
) -> None:
    layer = quant_linear(qtype).to(device)
    reference = twin(layer)
    x = random(3, 5, 256, dtype=dtype).to(device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, want = layer(x), reference(exact)
    assert y.dtype == dtype
    assert_close(y, want)
    grad = random(*y.shape, seed=3, dtype=dtype).to(device)
    y.backward(grad)
    want.backward(grad.double())
    assert_close(x.grad, exact.grad)
    assert_close(layer.bias.grad, reference.bias.grad, dtype)
    assert layer.weight.grad is None


def test_gradient_of_gradient() -> None:
    """grad_x is linear in grad_y, so its gradient is the product itself; x has no second one."""
    layer = quant_linear(bias=False)
    x, grad_y = random(4, 256).requires_grad_(), random(4, 24).requires_grad_()
    (grad_x,) = torch.autograd.grad(layer(x), x, grad_y, create_graph=True)
    direction = random(4, 256, seed=4)
    got = torch.autograd.grad(grad_x, (x, grad_y), direction, allow_unused=True)
    assert got[0] is None
    assert_close(got[1], layer(direction))


@pytest.mark.parametrize("shape", [(256,), (0, 256), (2, 1, 3, 256)])
def test_gradient_of_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer = quant_linear()
    x = random(*shape).requires_grad_()
    layer(x).sum().backward()  # an expanded gradient, all strides 0
    want = layer.dequantize().sum(0).expand(shape)
    torch.testing.assert_close(x.grad, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("qtype", ["Q4_0", "NVFP4"])
@pytest.mark.parametrize("decoded_bytes", [1, 24 * 3 * 64 * 4])
def test_gradient_in_parts_is_the_same(
    qtype: str, decoded_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = quant_linear(qtype, k=448), random(4, 448).requires_grad_()
    (whole,) = torch.autograd.grad(layer(x).square().sum(), x)
    monkeypatch.setattr(ops, "DECODED_BYTES", decoded_bytes)
    (parts,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert_close(parts, whole)


def test_the_short_way_without_gradients_gives_the_same() -> None:
    w, x = rows_of("Q4_K", 24, 256), random(4, 256)
    want = Q.gemm(x, w, int(QType.Q4_K), "auto")
    with torch.no_grad():
        assert torch.equal(ops.gemm(x.clone().requires_grad_(), w, QType.Q4_K), want)
    with torch.inference_mode():
        assert torch.equal(ops.gemm(x, w, QType.Q4_K), want)
    assert not ops.gemm(x, w, QType.Q4_K).requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, in torch.func.jvp
def test_forward_mode_says_that_it_is_not_there() -> None:
    layer, x = quant_linear(), random(4, 256)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (x,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_as_nn_linear(dtype: torch.dtype, device: str) -> None:
    layer = quant_linear().to(device)
    reference = twin(layer, torch.float32)
    x = random(4, 256).to(device).requires_grad_()
    with torch.autocast(device, dtype=dtype):
        y, want = layer(x), reference(x)
        direct = Q.gemm(x, layer.weight, layer.qtype)
        without_gradient = layer(x.detach())
    assert y.dtype == want.dtype == direct.dtype == without_gradient.dtype == dtype
    assert torch.equal(y, without_gradient)
    assert_close(y, want)
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.bias.grad.dtype == torch.float32
    with torch.autocast(device, dtype=dtype, enabled=False):
        assert layer(x).dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"x: expected .* got torch.float64"):
        quant_linear()(random(1, 256, dtype=torch.float64))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    w = rows_of("Q4_0", 24, 96).to(device)
    for x in (random(3, 96).requires_grad_(), random(2, 3, 96, dtype=torch.bfloat16)):
        args = (x.detach().to(device).requires_grad_(x.requires_grad), w, int(QType.Q4_0), "auto")
        torch.library.opcheck(Q.gemm.default, args)
    ids = torch.tensor([[1, 2], [3, 0]], device=device)
    torch.library.opcheck(Q.embedding.default, (ids, w, int(QType.Q4_0), torch.float16))


# ------------------------------------------------------------------------------ packed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("qtype", ["Q4_0", "Q4_K", "Q6_K", "Q8_0"])
def test_packed_layer(device: str, qtype: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = QuantLinear.from_linear(torch.nn.Linear(512, 70), qtype).to(device)
    layer = copy.deepcopy(plain).pack()
    assert layer.is_packed and layer.pack() is layer and not plain.is_packed
    assert layer.weight.shape == ops.packed_shape(layer.qtype, 70, 512)
    assert torch.equal(layer.blocks, plain.weight) and layer.weight_shape == (70, 512)
    assert torch.equal(layer.dequantize(), plain.dequantize()) and layer.nbytes == plain.nbytes
    assert "packed" in repr(layer) and "packed" not in repr(plain)
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 512, device=device, requires_grad=True)
        y, want = layer(x), plain(x)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(out.sum(), x)[0] for out in (y, want)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)

    state = layer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    torch.save(state, tmp_path / "state.pt")
    for other in (QuantLinear(512, 70, qtype, device=device), copy.deepcopy(layer)):
        with torch.no_grad():
            other.weight.zero_()
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert torch.equal(other.blocks, plain.weight)
        assert torch.equal(other(x), (layer if other.is_packed else plain)(x))
    again = pickle.loads(pickle.dumps(layer))
    assert again.is_packed and torch.equal(again(x), layer(x))
    empty = copy.deepcopy(layer).to("meta")
    assert empty.is_packed and empty.weight.is_meta
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), layer(x))
    again.algo = "auto_q8"
    with pytest.raises(NotImplementedError, match=r"algo: expected 'auto' for packed"):
        again(x)
    wrong = {**state, "weight": state["weight"][:, 1:]}
    with pytest.raises(RuntimeError, match=rf"weight: expected \[70, {plain.weight.shape[1]}\]"):
        layer.load_state_dict(wrong)

    moved = copy.deepcopy(layer).half()
    assert moved.is_packed == (device == "cuda")
    assert torch.equal(moved.cpu().weight, plain.weight.cpu()) and not moved.is_packed
    assert torch.equal(layer.unpack().weight, plain.weight) and not layer.is_packed


def test_what_cannot_be_packed() -> None:
    with pytest.raises(NotImplementedError, match=r"packed: IQ1_S has no packed form; .*Q4_0"):
        QuantLinear(256, 4, "IQ1_S").pack()
    with pytest.raises(NotImplementedError, match=r"algo: expected 'auto' for packed .* 'auto_q8'"):
        QuantLinear(256, 4, "Q4_K", algo="auto_q8").pack()
    plan = QuantLinear(256, 4, "Q4_K").pack().explain(3)
    assert plan.algo == "auto" and plan.device == "cpu" and not plan.rounds_activations
    assert set(plan.obstacles) == {"gemv", "few", "mma", "wgmma"}
    choices = [explain_gemm(m, 64, 256, "Q4_K", "sm_80", packed=True).algo for m in (1, 8, 9)]
    assert choices == ["gemv", "gemv", "mma"]


# ------------------------------------------------------------------------------ explain_gemm


def test_explain_gemm() -> None:
    plan = explain_gemm(1, 4096, 4096, "q4_k", "sm_90", algo="auto_q8")
    assert plan.algo in plan.available and plan.algo not in plan.obstacles
    assert plan.qtype == "Q4_K" and plan.device == "sm_90"
    for wanted in ("Q4_K", "m=1", plan.algo, plan.reason, *plan.available):
        assert wanted in str(plan)
    on_cpu = explain_gemm(3, 8, 256, QType.Q4_K, "cpu", torch.float32)
    assert not on_cpu.rounds_activations, "auto never rounds"
    assert "tensor cores" in on_cpu.obstacles["mma"] and "not mma:" in str(on_cpu)
    assert explain_gemm(3, 8, 256, "Q4_K", "cpu", algo="dp4a").rounds_activations
    with pytest.raises(AttributeError):
        plan.algo = "naive"  # type: ignore[misc]


@pytest.mark.parametrize("arch", ["cpu", "sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("m", [0, 1, 7, 64, 4096])
def test_auto_never_rounds(m: int, arch: str) -> None:
    for qtype in ("Q4_0", "Q4_K", "NVFP4", "F16", "F32"):
        for dtype in FLOATS:
            assert not explain_gemm(m, 8, 256, qtype, arch, dtype).rounds_activations


def test_explain_gemm_errors() -> None:
    with pytest.raises(ValueError, match="k: row of 100 weights is not a multiple of the 256"):
        explain_gemm(1, 1, 100, "Q4_K")
    with pytest.raises(ValueError, match="m: expected a size of 0 or more, got -1"):
        explain_gemm(-1, 1, 256, "Q4_K")
    with pytest.raises(TypeError, match=r"dtype: expected .* got torch.float64"):
        explain_gemm(1, 1, 256, "Q4_K", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"algo: expected one of auto, auto_q8, naive.*got 'fast'"):
        explain_gemm(1, 1, 256, "Q4_K", algo="fast")
    with pytest.raises(NotImplementedError, match="mma cannot serve this product: the CPU"):
        explain_gemm(1, 1, 256, "Q4_K", "cpu", algo="mma")
    with pytest.raises(ValueError, match="device: expected cpu, cuda or"):
        explain_gemm(1, 1, 256, "Q4_K", "meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected a GPU of this machine, got cuda"):
            explain_gemm(1, 1, 256, "Q4_K", "cuda")


# ------------------------------------------------------------------------------ QuantLinear


def test_attributes() -> None:
    layer = quant_linear("Q4_K", 24, 512)
    assert (layer.in_features, layer.out_features) == (512, 24)
    assert layer.weight_shape == (24, 512) and layer.weight.shape == (24, 288)
    assert layer.qtype is QType.Q4_K and layer.format.name == "Q4_K"
    assert layer.nbytes == 24 * 288 and layer.bits_per_weight == 4.5
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    text = "in_features=512, out_features=24, bias=True, Q4_K, 6_912 bytes, 4.5 bits per weight"
    assert repr(layer) == f"QuantLinear({text})"
    assert "algo=auto_q8" in repr(quant_linear(algo="auto_q8"))
    assert layer.dequantize().dtype == torch.float32
    assert layer.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert layer.explain(7).m == 7


@pytest.mark.parametrize("fmt", quantgemm.formats.FORMATS.values(), ids=lambda f: f.name)
def test_a_fresh_layer_is_zero(fmt: quantgemm.formats.Format) -> None:
    if (fmt.name[0] == "I" and fmt.is_plain) or fmt.name == "F64":
        pytest.skip("not a type of weights")
    layer = QuantLinear(2 * fmt.block_elems, 3, fmt.type_id)
    assert torch.equal(layer(random(1, 2 * fmt.block_elems)), torch.zeros(1, 3))


def test_algo_is_passed_on() -> None:
    x = random(2, 256)
    for algo in ("naive", "tiled", "dp4a", "auto_q8"):
        layer = quant_linear(bias=False, algo=algo)
        assert torch.equal(layer(x), ops.gemm(x, layer.weight, layer.qtype, algo))
    layer.algo = "mma"
    with pytest.raises(NotImplementedError, match="mma cannot serve"):
        layer(x)


@pytest.mark.parametrize("bias_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_result_has_the_dtype_of_x(dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    layer = quant_linear().to(bias_dtype)
    x = random(3, 256, dtype=dtype)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            y = layer(x)
        assert y.dtype == dtype
        # Rounded once where bias is wider.
        want = ops.gemm(x, layer.weight, layer.qtype).double() + layer.bias.double()
        assert_close(y, want)
    layer(x).float().sum().backward()
    assert layer.bias.grad.dtype == bias_dtype


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to dtype": (lambda m: m.to(torch.float16), torch.float16),
    "to device and dtype": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "to itself": (lambda m: m.to("cpu"), torch.float32),
    "share_memory": (lambda m: m.share_memory(), torch.float32),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_leave_the_bytes_alone(name: str) -> None:
    cast, dtype = CASTS[name]
    model = nn.ModuleDict(
        {"linear": quant_linear(), "table": QuantEmbedding.from_blocks(rows_of("Q4_0", 7, 64), 2)}
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert cast(model) is model
    for key, value in model.state_dict().items():
        if key == "linear.bias":
            assert value.dtype == dtype
        else:
            assert value.dtype == before[key].dtype and torch.equal(value, before[key])
    assert model["table"].dtype == dtype
    assert model["table"](torch.tensor([3])).dtype == dtype
    assert not model["linear"].weight.requires_grad


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies(copied: str, tmp_path: Path) -> None:
    table = QuantEmbedding.from_blocks(rows_of("Q4_K", 24, 256), "Q4_K", padding_idx=3)
    model = nn.ModuleList([table, table.as_linear(random(24), algo="tiled")])
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert repr(other) == repr(model)
    assert other[0].weight is other[1].weight and other[0].weight is not model[0].weight
    assert torch.equal(other[1](random(2, 256)), model[1](random(2, 256)))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="in_features: 100 is not a multiple of the 256-weight Q4"):
        QuantLinear(100, 8, "Q4_K")
    with pytest.raises(ValueError, match="out_features: expected a size of 0 or more, got -1"):
        QuantLinear(256, -1, "Q4_K")
    with pytest.raises(ValueError, match="unknown GGUF type 'Q9_Z'"):
        QuantLinear(256, 8, "Q9_Z")
    with pytest.raises(ValueError, match=r"algo: expected one of .* got 'best'"):
        QuantLinear(256, 8, "Q4_K", algo="best")
    with pytest.raises(ValueError, match="blocks: row of 143 bytes is not a multiple of the 144"):
        QuantLinear.from_blocks(torch.zeros(2, 143, dtype=torch.uint8), "Q4_K")
    with pytest.raises(TypeError, match=r"blocks: expected torch.uint8, got torch.float32"):
        QuantLinear.from_blocks(torch.zeros(2, 144), "Q4_K")
    with pytest.raises(ValueError, match=r"bias: expected shape \[24\], got \[23\]"):
        QuantLinear.from_blocks(rows_of("Q4_K", 24, 256), "Q4_K", torch.zeros(23))
    with pytest.raises(TypeError, match=r"linear: expected a weight of .* got torch.float64"):
        QuantLinear.from_linear(nn.Linear(256, 8).double(), "Q4_K")
    with pytest.raises(ValueError, match="x: expected rows of 256 values"):
        quant_linear()(random(2, 255))
    with pytest.raises(ValueError, match="padding_idx: expected one of 8 rows, got 8"):
        QuantEmbedding(8, 256, "Q4_K", padding_idx=8)
    with pytest.raises(ValueError, match="embedding_dim: 100 is not a multiple"):
        QuantEmbedding(8, 100, "Q4_K")
    with pytest.raises(ValueError, match="embedding: expected max_norm None"):
        QuantEmbedding.from_embedding(nn.Embedding(8, 256, max_norm=1.0), "Q4_K")


def test_from_linear() -> None:
    linear = nn.Linear(256, 8).eval()
    importance = torch.rand(256, generator=torch.Generator().manual_seed(5))
    layer = QuantLinear.from_linear(linear, "Q4_K", importance, algo="tiled")
    assert torch.equal(layer.weight, ops.quantize(linear.weight.detach(), QType.Q4_K, importance))
    assert layer.bias is linear.bias and not layer.training and layer.algo == "tiled"
    assert QuantLinear.from_linear(nn.Linear(256, 8, bias=False), QType.Q8_0).bias is None
    half = QuantLinear.from_linear(linear.half(), 12)
    assert half.bias.dtype == torch.float16


# ------------------------------------------------------------------------------ GGUF


@pytest.fixture
def gguf(tmp_path: Path) -> quantgemm.GGUFFile:
    path = tmp_path / "tiny.gguf"
    tensors = {
        "w": (rows_of("Q4_K", 24, 256), "Q4_K"),
        "b": random(24, seed=2),
        "half": random(24, 256).half(),
        "table": (rows_of("Q6_K", 10, 256), "Q6_K"),
    }
    quantgemm.save_gguf(path, tensors)
    return quantgemm.open_gguf(path)


def test_from_gguf_is_the_mapped_file(gguf: quantgemm.GGUFFile) -> None:
    tensor = gguf.tensors["w"]
    layer = QuantLinear.from_gguf(tensor, gguf.tensors["b"])
    assert layer.weight.data_ptr() == tensor.blocks.data_ptr()
    assert torch.equal(layer.dequantize(), tensor.dequantize())
    assert torch.equal(layer.bias, random(24, seed=2)) and layer.bias.requires_grad
    x = random(2, 256)
    want = layer(x)
    gguf.close()
    del gguf, tensor
    gc.collect()
    assert torch.equal(layer(x), want), "the layer keeps the mapping alive"
    assert torch.equal(copy.deepcopy(layer)(x), want)


def test_from_gguf_options(gguf: quantgemm.GGUFFile) -> None:
    w, b = gguf.tensors["w"], gguf.tensors["b"]
    assert QuantLinear.from_gguf(w).bias is None
    assert QuantLinear.from_gguf(w, b, dtype=torch.bfloat16).bias.dtype == torch.bfloat16
    assert QuantLinear.from_gguf(w, torch.zeros(24), dtype=torch.half).bias.dtype == torch.half
    assert QuantLinear.from_gguf(w, b, device="meta").weight.is_meta
    plain = QuantLinear.from_gguf(gguf.tensors["half"])
    assert plain.qtype == QType.F16
    assert_close(plain(random(2, 256)), twin(plain)(random(2, 256).double()))
    with pytest.raises(ValueError, match=r"tensor: expected two dimensions .* got 'b' of shape"):
        QuantLinear.from_gguf(b)
    table = QuantEmbedding.from_gguf(gguf.tensors["table"], padding_idx=-1, dtype=torch.half)
    assert table.weight.data_ptr() == gguf.tensors["table"].blocks.data_ptr()
    assert table.padding_idx == 9 and table(torch.tensor([1])).dtype == torch.half


# ------------------------------------------------------------------------------ QuantEmbedding


@pytest.mark.parametrize("device", DEVICES)
def test_embedding(device: str) -> None:
    table = QuantEmbedding.from_blocks(rows_of("Q4_K", 10, 512), "Q4_K").to(device)
    ids = torch.tensor([[1, 9, 0], [3, 3, 2]], device=device)
    assert torch.equal(table(ids), table.dequantize()[ids])
    assert torch.equal(table(ids.int()), table(ids))
    assert (table.num_embeddings, table.embedding_dim) == (10, 512)
    text = "10, 512, Q4_K, 2_880 bytes, 4.5 bits per weight, torch.float32"
    assert repr(table) == f"QuantEmbedding({text})"
    if device == "cpu":
        with pytest.raises(IndexError, match="ids: expected 0 to 9"):
            table(torch.tensor([10]))


def test_from_embedding_and_default_dtype() -> None:
    table = QuantEmbedding.from_embedding(nn.Embedding(10, 256, 2).bfloat16().eval(), "Q8_0")
    assert table.padding_idx == 2 and table.dtype == torch.bfloat16 and not table.training
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        assert QuantEmbedding(4, 256, "Q4_K").dtype == torch.float16
    finally:
        torch.set_default_dtype(before)


def test_output_head_on_the_same_bytes() -> None:
    table = QuantEmbedding.from_blocks(rows_of("Q6_K", 10, 256), "Q6_K")
    head = table.as_linear()
    assert head.weight is table.weight and head.out_features == 10 and head.bias is None
    model = nn.ModuleList([table, head])
    assert len(list(model.parameters())) == 1
    model.to("cpu", torch.half)
    assert model[0].weight is model[1].weight
    assert_close(head(random(2, 256)), twin(head)(random(2, 256).double()))


# ------------------------------------------------------------------------------ checkpoints


def test_state_dict_round_trip(tmp_path: Path) -> None:
    model = nn.Sequential(QuantEmbedding(10, 256, "Q6_K"), quant_linear())
    state = model.state_dict()
    assert set(state) == {"0.weight", "0.weight_type", "1.weight", "1.weight_type", "1.bias"}
    assert all(type(t) is torch.Tensor for t in state.values())
    assert state["1.weight_type"].item() == QType.Q4_K
    torch.save(state, tmp_path / "state.pt")
    other = nn.Sequential(QuantEmbedding(10, 256, "Q6_K"), QuantLinear(256, 24, "Q4_K"))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    x = random(3, 256)
    assert torch.equal(other[1](x), model[1](x))
    assert not other[1].weight.requires_grad and other[1].bias.requires_grad


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, load_model, save_file, save_model

    layer, other = quant_linear(), QuantLinear(256, 24, "Q4_K")
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(random(1, 256)), layer(random(1, 256)))

    def tied() -> nn.ModuleDict:
        table = QuantEmbedding(10, 256, "Q6_K")
        return nn.ModuleDict({"table": table, "head": table.as_linear()})

    model, copied = tied(), tied()
    model["table"].weight.data.copy_(rows_of("Q6_K", 10, 256))
    save_model(model, str(tmp_path / "tied.safetensors"))
    load_model(copied, tmp_path / "tied.safetensors")
    assert torch.equal(copied["head"].weight, model["table"].weight)


def test_meta_then_assign() -> None:
    source = quant_linear()
    with torch.device("meta"):
        layer = QuantLinear(256, 24, "Q4_K")
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    assert layer(torch.empty(2, 256, device="meta")).shape == (2, 24)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert layer.weight.data_ptr() == source.weight.data_ptr()
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert torch.equal(layer(random(2, 256)), source(random(2, 256)))

    bare = {"weight": source.weight, "bias": source.bias}  # as a file without types has it
    layer = QuantLinear(256, 24, "Q4_K", device="meta")
    with pytest.raises(RuntimeError, match=r'Missing key.* "weight_type"'):
        layer.load_state_dict(bare, assign=True)
    layer.load_state_dict(bare, assign=True, strict=False)
    assert layer.weight_type.item() == QType.Q4_K


def test_to_empty_keeps_the_type() -> None:
    layer = nn.utils.skip_init(QuantLinear, 256, 24, "Q4_K", device="cpu")
    assert layer.weight_type.item() == QType.Q4_K and not layer.weight.requires_grad
    layer.load_state_dict(quant_linear().state_dict())
    assert torch.equal(layer(random(2, 256)), quant_linear()(random(2, 256)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_wrong_checkpoint_is_named(strict: bool, assign: bool) -> None:
    def load(target: QuantLinear, source: nn.Module) -> None:
        before = target.weight.clone()
        try:
            nn.ModuleDict({"a": target}).load_state_dict(
                nn.ModuleDict({"a": source}).state_dict(), strict=strict, assign=assign
            )
        finally:
            assert torch.equal(target.weight, before), "nothing is half loaded"

    same_size = r"a.weight_type: expected 2 \(Q4_0\), got 20 \(IQ4_NL\)"
    with pytest.raises(RuntimeError, match=same_size):
        load(QuantLinear(256, 24, "Q4_0"), QuantLinear(256, 24, "IQ4_NL"))
    with pytest.raises(RuntimeError, match=r"a.weight_type: expected 2 \(Q4_0\), got 8 \(Q8_0\)"):
        load(QuantLinear(256, 24, "Q4_0"), QuantLinear(256, 24, "Q8_0"))
    numbers = (
        r"a.weight: expected torch.uint8 \[24, 144\], rows of Q4_K, got torch.float32 \[24, 256"
    )
    with pytest.raises(RuntimeError, match=numbers):
        load(QuantLinear(256, 24, "Q4_K"), nn.Linear(256, 24))
    with pytest.raises(RuntimeError, match=r"a.weight: expected \[24, 144\], rows of 256 weights"):
        load(QuantLinear(256, 24, "Q4_K"), QuantLinear(512, 24, "Q4_K"))


# ------------------------------------------------------------------------------ other people's code


def offloading_cases(folder: Path) -> dict[str, Callable[[nn.Module], nn.Module]]:
    accelerate = pytest.importorskip("accelerate")
    where = {"0": "cpu", "1": "cpu", "2": "disk"}
    return {
        "cpu_offload": lambda m: accelerate.cpu_offload(m, "cpu"),
        "disk_offload": lambda m: accelerate.disk_offload(m, folder, "cpu"),
        "dispatch_model": lambda m: accelerate.dispatch_model(
            m, where, main_device="cpu", offload_dir=folder
        ),
    }


@pytest.mark.parametrize("name", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_accelerate_offloads_the_bytes(name: str, tmp_path: Path) -> None:
    model, x = quant_mlp(), random(2, 64)
    want = model(x)
    model = offloading_cases(tmp_path)[name](model)
    assert model[2].weight.is_meta, "it is away"
    for _ in range(2):
        assert torch.equal(model(x), want)
    assert model[2].weight.is_meta, "and away again"
    x.requires_grad_()
    model(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_accelerate_loads_a_checkpoint(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from safetensors.torch import save_file

    model, x = quant_mlp(), random(2, 64)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with accelerate.init_empty_weights(include_buffers=True):
        empty = quant_mlp_of_zeros()
    sizes = accelerate.utils.compute_module_sizes(empty)
    assert sizes["0.weight"] == model[0].nbytes
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "model.safetensors"), {"0": "cpu", "1": "cpu", "2": "cpu"}
    )
    assert torch.equal(loaded(x), model(x))
    assert not loaded[0].weight.requires_grad


def quant_mlp_of_zeros() -> nn.Module:
    return nn.Sequential(QuantLinear(64, 96, "Q8_0"), nn.GELU(), QuantLinear(96, 64, "Q8_0"))


def test_a_wrong_type_from_a_loader_that_does_not_ask(tmp_path: Path) -> None:
    """Rows of Q4_0 and Q4_K are equally long: no check of shapes would find out."""
    accelerate = pytest.importorskip("accelerate")
    from safetensors.torch import save_file

    model = nn.Sequential(quant_linear("Q4_0"), nn.Identity())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with accelerate.init_empty_weights():
        other = nn.Sequential(QuantLinear(256, 24, "Q4_K"), nn.Identity())
    where = {"0": "cpu", "1": "cpu"}
    accelerate.load_checkpoint_in_model(other, str(tmp_path / "model.safetensors"), where)
    wrong = r"QuantLinear: weight_type: expected 12 \(Q4_K\), got 2 \(Q4_0\)"
    for _ in range(2):
        with pytest.raises(ValueError, match=wrong):
            other(random(1, 256))
        other.half().float()  # does not hide it


class LoRA(nn.Module):
    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(random(rank, base.in_features, seed=6) * 0.1)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("fused", [False, True])
def test_lora_trains_over_frozen_weights(fused: bool) -> None:
    model = quant_mlp()
    model = nn.Sequential(LoRA(model[0]), model[1], LoRA(model[2]))
    frozen = [model[0].base.weight.clone(), model[2].base.weight.clone()]
    x, target = random(16, 64), random(16, 64, seed=7)
    # All parameters: an optimizer passes over those that have no gradient.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, fused=fused)
    losses = []
    for _ in range(25):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert torch.equal(frozen[0], model[0].base.weight)
    assert torch.equal(frozen[1], model[2].base.weight)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model, x = quant_mlp(), random(4, 64).requires_grad_()
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert torch.equal(x.grad, want)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_break(device: str) -> None:
    torch._dynamo.reset()
    model = quant_mlp().to(device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = random(4, 64).to(device)
    with torch.no_grad():
        assert_close(compiled(x), model(x))
    y, x = random(4, 64).to(device).requires_grad_(), x.requires_grad_()
    y.data.copy_(x.data)
    model(x).square().sum().backward()
    compiled(y).square().sum().backward()
    assert_close(y.grad, x.grad)
    with torch.autocast(device, dtype=torch.bfloat16):
        got, want = compiled(x), model(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert_close(got, want)


def test_compiles_an_embedding() -> None:
    torch._dynamo.reset()
    table = QuantEmbedding.from_blocks(rows_of("Q4_K", 10, 256), "Q4_K", dtype=torch.half)
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor([1, 5])), table(torch.tensor([1, 5])))


def test_export() -> None:
    model, x = quant_mlp(), random(4, 64)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for m in (2, 7):
        assert torch.equal(program.module()(random(m, 64)), model(random(m, 64)))


# ------------------------------------------------------------------------------ replace_linear


def test_replaces_every_linear_in_place() -> None:
    model, x = small_mlp(), random(3, 64)
    want, bias = model(x), model[0].bias
    same, report = replace_linear(model, "Q8_0", algo="tiled")
    assert same is model and all(isinstance(model[i], QuantLinear) for i in (0, 2))
    assert model[0].bias is bias and model[0].algo == "tiled"
    error = (model(x) - want).norm() / want.norm()
    assert 0 < error < 0.02
    assert [layer.name for layer in report.replaced] == ["0", "2"] and not report.skipped
    assert report.bytes_before == 4 * 2 * 64 * 96 and report.bytes_after == 34 * 2 * 64 * 96 // 32
    biases = 4 * (64 + 96)
    assert report.total_bytes_before == report.bytes_before + biases
    assert report.total_bytes_after == report.bytes_after + biases + 8  # two type ids
    assert "Q8_0: 2 layers replaced, 0 not" in str(report)


def test_the_root_itself() -> None:
    linear = nn.Linear(64, 8)
    layer, report = replace_linear(linear, "Q4_0")
    assert isinstance(layer, QuantLinear) and layer.in_features == 64
    assert report.replaced[0].name == "" and "(the module itself) [8, 64]" in str(report)
    again, report = replace_linear(layer, "Q8_0")
    assert again is layer and report.skipped == {"": "already quantised (Q4_0)"}


@pytest.mark.parametrize(
    "filter",
    ["*.up", re.compile(r"^\w+\.\d+\.up$"), lambda name, layer: layer.out_features == 128],
    ids=["glob", "regular expression", "callable"],
)
def test_filters(filter: Any) -> None:
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64)})

    model = nn.ModuleDict({"blocks": nn.ModuleList([block() for _ in range(3)])})
    _, report = replace_linear(model, "Q4_0", filter)
    assert {layer.name for layer in report.replaced} == {f"blocks.{i}.up" for i in range(3)}
    assert report.skipped == {f"blocks.{i}.down": "left out by the filter" for i in range(3)}
    text = str(report)
    assert "blocks.*.up [128, 64] x 3: 96.00 KiB -> 13.50 KiB" in text
    assert "not blocks.*.down x 3: left out by the filter" in text
    _, rest = replace_linear(model, "Q8_0")
    assert len(rest.replaced) == 3
    assert rest.skipped == {f"blocks.{i}.up": "already quantised (Q4_0)" for i in range(3)}


def test_what_cannot_be_replaced_says_why() -> None:
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    hooked = nn.Linear(256, 8)
    hooked.register_forward_hook(lambda *_: None)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(256, 8))
    pruned = nn.Linear(256, 8)
    prune.random_unstructured(pruned, "weight", 0.5)
    model = nn.ModuleDict(
        {
            "short": nn.Linear(100, 8),
            "twice": Twice(256, 8),
            "wide": nn.Linear(256, 8).double(),
            "hooked": hooked,
            "normed": normed,
            "pruned": pruned,
            "attention": nn.MultiheadAttention(256, 2),
            "encoder": nn.TransformerEncoderLayer(256, 2, 256),
            "fine": nn.Linear(256, 8),
        }
    )
    _, report = replace_linear(model, "Q4_K")
    assert [layer.name for layer in report.replaced] == ["fine"]
    wanted = {
        "short": "in_features: 100 is not a multiple of the 256-weight Q4_K block",
        "twice": "a Twice, whose forward",
        "wide": "its weight is torch.float64",
        "hooked": "it has hooks",
        "normed": "a ParametrizedLinear",
        "pruned": "weight_mask",
        "attention.out_proj": "the MultiheadAttention around it reads its weight",
        "encoder.self_attn.out_proj": "the MultiheadAttention",
        "encoder.linear1": "the TransformerEncoderLayer",
        "encoder.linear2": "the TransformerEncoderLayer",
    }
    assert set(report.skipped) == set(wanted)
    for name, why in wanted.items():
        assert why in report.skipped[name]
        assert f"not {re.sub('[0-9]', '*', name)}" in str(report)
    x = random(3, 1, 256)
    model.eval()
    with torch.no_grad():
        model["encoder"](x)  # its fast path still finds numbers


def test_a_shared_module_is_replaced_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.inner = nn.ModuleList([self.first, nn.Linear(64, 64)])

    model = Model()
    _, report = replace_linear(model, "Q4_0")
    assert model.first is model.inner[0] and isinstance(model.first, QuantLinear)
    assert [layer.name for layer in report.replaced] == ["first", "inner.1"]


def test_layers_that_share_a_weight_keep_sharing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    _, report = replace_linear(model, "Q4_0")
    assert model[0].weight is model[1].weight and model[0].bias is not model[1].bias
    assert report.replaced[1].shared_with == "0" and report.replaced[1].bytes_after == 0
    assert report.bytes_after == 64 * 36
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    _, report = replace_linear(model, "Q4_0", "1")
    assert not report.replaced and report.skipped["1"] == "its weight is also that of 0"


def tied_model(separate: bool) -> nn.ModuleDict:
    table, head = nn.Embedding(10, 64, padding_idx=1), nn.Linear(64, 10, bias=False)
    head.weight = nn.Parameter(table.weight.detach()) if separate else table.weight
    return nn.ModuleDict({"table": table, "body": nn.Linear(64, 64), "head": head})


@pytest.mark.parametrize("separate", [False, True], ids=["one Parameter", "one memory"])
def test_a_weight_tied_to_an_embedding(separate: bool) -> None:
    model = tied_model(separate)
    _, report = replace_linear(model, "Q8_0")
    assert [layer.name for layer in report.replaced] == ["body"]
    assert report.skipped == {
        "head": "its weight is also that of table; tied=True replaces both",
    }
    assert type(model["head"]) is nn.Linear

    _, report = replace_linear(model, "Q8_0", tied=True)
    assert isinstance(model["table"], QuantEmbedding) and model["table"].padding_idx == 1
    assert model["table"].weight is model["head"].weight
    assert [(r.name, r.shared_with) for r in report.replaced] == [("head", None), ("table", "head")]
    assert report.bytes_before == 10 * 64 * 4 and report.bytes_after == 10 * 68
    ids = torch.tensor([4, 2])
    assert torch.equal(model["table"](ids), model["head"].dequantize()[ids])


def test_importance_goes_to_its_layer() -> None:
    model = nn.Sequential(nn.Linear(256, 8), nn.Linear(256, 8))
    importance = torch.rand(256, generator=torch.Generator().manual_seed(8))
    want = ops.quantize(model[1].weight.detach(), QType.Q4_K, importance)
    plain = ops.quantize(model[0].weight.detach(), QType.Q4_K)
    with pytest.raises(ValueError, match="importance: expected names of layers, got 7"):
        replace_linear(model, "Q4_K", importance={"7": importance})
    replace_linear(model, "Q4_K", importance={"1": importance})
    assert torch.equal(model[1].weight, want) and torch.equal(model[0].weight, plain)


def test_replacing_on_meta_then_loading() -> None:
    with torch.device("meta"):
        empty = small_mlp()
    _, report = replace_linear(empty, "Q8_0")
    assert len(report.replaced) == 2 and empty[0].weight.is_meta
    model = quant_mlp()
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(random(2, 64)), model(random(2, 64)))


def test_numbers_are_freed_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    storages = [weakref.ref(layer.weight.untyped_storage()) for layer in model]
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    quantize = ops.quantize

    def counting(*args: Any) -> torch.Tensor:
        alive.append(sum(w() is not None for w in weights))
        return quantize(*args)

    monkeypatch.setattr(ops, "quantize", counting)
    gc.disable()
    try:
        replace_linear(model, "Q4_0")
    finally:
        gc.enable()
    assert alive == [4, 3, 2, 1]
    assert all(storage() is None for storage in storages)


def test_wrong_arguments_of_replace_linear() -> None:
    with pytest.raises(TypeError, match=r"filter: expected a glob, .* got int"):
        replace_linear(small_mlp(), "Q4_0", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown GGUF type"):
        replace_linear(small_mlp(), "Q4")
    with pytest.raises(NotImplementedError, match="IQ2_XS"):
        replace_linear(nn.Linear(256, 8), "IQ2_XS")


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    replace_linear(small_mlp(), "Q8_0", progress=True)
    assert "0/2" in capsys.readouterr().err
    replace_linear(small_mlp(), "Q8_0", progress=False)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------ on a GPU


@pytest.mark.cuda
def test_moves_to_the_gpu_and_back() -> None:
    layer = quant_linear()
    before = layer.weight.detach().clone()
    layer.cuda()
    assert layer.weight.is_cuda and layer.bias.is_cuda and layer.weight_type.is_cuda
    assert torch.equal(layer.weight.cpu(), before) and not layer.weight.requires_grad
    x = random(3, 256)
    got = layer.half()(x.cuda().half())
    assert_close(got.cpu(), twin(layer.cpu())(x.double()))
    assert QuantLinear(256, 8, "Q4_K", device="cuda").weight.is_cuda
    assert explain_gemm(1, 8, 256, "Q4_K").device.startswith("sm_")
    with pytest.raises(ValueError, match="w: expected on cuda"):
        quant_linear()(x.cuda())


@pytest.mark.cuda
def test_a_layer_in_a_cuda_graph() -> None:
    layer = quant_linear().to("cuda", torch.bfloat16)
    x = random(4, 256, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(x.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer(x))


@pytest.mark.cuda
def test_accelerate_offloads_from_a_gpu() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = quant_mlp(), random(2, 64)
    want = model(x)
    model = accelerate.cpu_offload(model, "cuda")
    assert model[0].weight.is_meta  # on the CPU until its own forward
    for device in ("cpu", "cuda"):
        got = model(x.to(device))
        assert got.device.type == device  # accelerate answers where it was asked
        assert_close(got.cpu(), want)
    assert model[0].weight.is_meta


@pytest.mark.cuda
def test_a_backward_pass_decodes_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantLinear(4096, 4096, "Q4_0", bias=False, device="cuda")
    x = torch.ones(1, 4096, device="cuda", requires_grad=True)
    monkeypatch.setattr(ops, "DECODED_BYTES", 1 << 20)
    layer(x).sum().backward()  # cuBLAS takes its workspace at autograd's first product
    y = layer(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y.sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 32 << 20, "the whole weight would be 64 MiB of float32"
