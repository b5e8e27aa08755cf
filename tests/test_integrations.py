# SPDX-License-Identifier: MIT
"""Other people's libraries with our kernels inside. What is not installed is skipped, by name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import parse as parse_version

from quantgemm import QuantEmbedding, QuantLinear, SparseKVCache, ops, replace_linear, save_gguf
from quantgemm.formats import QType
from quantgemm.integrations.common import Patch, linear, module_of, serves

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

HIDDEN, FEED, HEADS, KV_HEADS, VOCAB = 64, 128, 4, 2, 96


def blocks_of(rows: int, cols: int, seed: int, qtype: QType = QType.Q8_0) -> torch.Tensor:
    weights = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) / cols**0.5
    return ops.quantize(weights, qtype)


def write_lfm2(path: Path) -> None:
    """A tiny random LFM2 in a GGUF file: a convolution layer, then one with attention.

    transformers has its own GGUF loading for a few architectures; this is the smallest of them.
    """
    kv = HIDDEN // HEADS * KV_HEADS
    feed = {"ffn_gate": (FEED, HIDDEN), "ffn_up": (FEED, HIDDEN), "ffn_down": (HIDDEN, FEED)}
    conv = {"shortconv.in_proj": (3 * HIDDEN, HIDDEN), "shortconv.out_proj": (HIDDEN, HIDDEN)}
    attention = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
    attention |= {"attn_output": (HIDDEN, HIDDEN)}
    tensors: dict[str, Any] = {
        "token_embd.weight": (blocks_of(VOCAB, HIDDEN, 1), "Q8_0"),
        "token_embd_norm.weight": torch.ones(HIDDEN),
        "blk.0.shortconv.conv.weight": torch.linspace(-1, 1, HIDDEN * 3).reshape(-1, 3),
        "blk.1.attn_q_norm.weight": torch.ones(HIDDEN // HEADS),
        "blk.1.attn_k_norm.weight": torch.ones(HIDDEN // HEADS),
    }
    for layer, matrices in enumerate((conv | feed, attention | feed)):
        tensors[f"blk.{layer}.attn_norm.weight"] = torch.ones(HIDDEN)
        tensors[f"blk.{layer}.ffn_norm.weight"] = torch.ones(HIDDEN)
        for i, (name, shape) in enumerate(matrices.items()):
            tensors[f"blk.{layer}.{name}.weight"] = (blocks_of(*shape, 10 * layer + i), "Q8_0")
    metadata = {
        "general.architecture": "lfm2",
        "lfm2.context_length": 64,
        "lfm2.embedding_length": HIDDEN,
        "lfm2.block_count": 2,
        "lfm2.feed_forward_length": FEED,
        "lfm2.attention.head_count": HEADS,
        "lfm2.attention.head_count_kv": [0, KV_HEADS],
        "lfm2.attention.layer_norm_rms_epsilon": 1e-5,
        "lfm2.rope.freq_base": 10000.0,
        "lfm2.shortconv.l_cache": 3,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(VOCAB)],
    }
    save_gguf(path, tensors, metadata)


# ---- what they share ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 9, 400])
def test_linear(device: str, rows: int) -> None:
    blocks = blocks_of(96, 128, 0).to(device)
    x = torch.randn(2, rows, 128, device=device, requires_grad=True)
    bias = torch.randn(96, device=device)
    want = x @ ops.dequantize(blocks, QType.Q8_0).T + bias
    y = linear(x, blocks, QType.Q8_0, bias)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        still = linear(x, blocks, QType.Q8_0, bias)
    torch.testing.assert_close(still, want, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_patch_gives_everything_back() -> None:
    class Owner:
        name = "before"

    patch = Patch()
    assert not patch
    patch.set(Owner, "name", "once")
    patch.set(Owner, "name", "twice")
    assert Owner.name == "twice" and patch
    patch.undo()
    assert Owner.name == "before" and not patch


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ImportError, match=r"no-such-package is not installed: pip install"):
        module_of("no-such-package", "nothing", {}, "")
    with pytest.raises(ImportError, match=r"numpy [\d.]+ has no numpy.nowhere .*: try this"):
        module_of("numpy", "numpy.nowhere", {}, "try this")
    with pytest.raises(ImportError, match=r"numpy of numpy [\d.]+ has no mul_mat: try this"):
        module_of("numpy", "numpy", {"ndarray": ("dtype",), "mul_mat": ()}, "try this")
    with pytest.raises(ImportError, match=r"numpy of numpy [\d.]+ has no fly: try this"):
        module_of("numpy", "numpy", {"ndarray": ("dtype", "fly")}, "try this")


def test_block_types_are_served() -> None:
    assert serves(QType.Q4_K) and serves(QType.IQ1_S)
    assert not serves(QType.F16) and not serves(12345)


# ---- transformers ----


@pytest.fixture
def seat() -> Iterator[Any]:
    transformers = pytest.importorskip("transformers")
    from quantgemm.integrations import transformers as ours

    if parse_version(transformers.__version__) < parse_version("5.23"):
        with pytest.raises(ImportError, match=r"has no .*quantgemm\.load_model"):
            ours.enable()
        pytest.skip(f"transformers {transformers.__version__} has no seat for GGUF kernels")
    yield ours
    ours.disable()


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    write_lfm2(directory / "tiny.gguf")
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    return AutoModelForCausalLM.from_pretrained(directory, gguf_file="tiny.gguf", **options).eval()


def packed_weights(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.dtype == torch.uint8}


@pytest.mark.parametrize("device", DEVICES)
def test_transformers_keeps_weights_packed(seat: Any, tmp_path: Path, device: str) -> None:
    plain = load(tmp_path).to(device)  # without a kernel everything is dequantised
    assert not packed_weights(plain)
    seat.enable()
    assert seat.is_enabled()
    model = load(tmp_path).to(device)
    assert "model.embed_tokens.weight" in packed_weights(model)
    assert len(packed_weights(model)) == 1 + 2 + 4 + 2 * 3
    ids = torch.randint(VOCAB, (2, 11), device=device)
    for tokens in (ids, ids[:1, :3]):  # more rows than a GEMV takes, and fewer
        with torch.no_grad():
            got, want = model(tokens).logits, plain(tokens).logits
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4)
    seat.disable()
    assert not seat.is_enabled()


def test_transformers_generates(seat: Any, tmp_path: Path) -> None:
    plain = load(tmp_path)
    seat.enable()
    model = load(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_transformers_int8_is_asked_for(seat: Any, tmp_path: Path) -> None:
    seat.enable("auto_q8")
    model = load(tmp_path)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"algo: expected one of auto, .*, got 'fastest'"):
        seat.enable("fastest")


@pytest.mark.parametrize("device", DEVICES)
def test_transformers_experts(seat: Any, device: str) -> None:
    from transformers.integrations.gguf.utils import GgufExperts

    seat.enable()
    experts, tokens, chosen = 4, 5, 2
    layer = GgufExperts(experts, HIDDEN, FEED, QType.Q8_0, QType.Q4_0, torch.nn.functional.silu)
    gate_up = blocks_of(experts * 2 * FEED, HIDDEN, 1).reshape(experts, 2 * FEED, -1)
    down = blocks_of(experts * HIDDEN, FEED, 2, QType.Q4_0).reshape(experts, HIDDEN, -1)
    layer.gate_up_proj.data, layer.down_proj.data = gate_up, down
    layer.to(device)
    x = torch.randn(tokens, HIDDEN, device=device)
    ids = torch.randint(experts, (tokens, chosen), device=device)
    shares = torch.rand(tokens, chosen, device=device)
    wide = ops.dequantize(layer.gate_up_proj, QType.Q8_0)[ids]
    gate, up = torch.einsum("tk,tcnk->tcn", x, wide).chunk(2, -1)
    hidden = torch.nn.functional.silu(gate) * up
    narrow = ops.dequantize(layer.down_proj, QType.Q4_0)[ids]
    want = torch.einsum("tck,tcnk,tc->tn", hidden, narrow, shares)
    torch.testing.assert_close(layer(x, ids, shares), want, rtol=1e-3, atol=1e-4)


def test_older_transformers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from quantgemm.integrations import transformers as ours

    import_module = importlib.import_module

    def without_gguf(name: str, *rest: Any) -> Any:
        if name.startswith("transformers.integrations.gguf"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without_gguf)
    version = transformers.__version__
    with pytest.raises(ImportError, match=f"transformers {version} has no .*quantgemm.load_model"):
        ours.enable()
    assert not ours.is_enabled()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "chosen"), [(1, 1), (3, 2), (40, 4)])
def test_experts(device: str, tokens: int, chosen: int) -> None:
    from quantgemm.integrations.transformers import multiply_by_experts

    experts, n, k = 5, 33, 64
    blocks = blocks_of(experts * n, k, 7).reshape(experts, n, -1).to(device)
    x = torch.randn(tokens, k, device=device)
    ids = torch.randint(experts - 1, (tokens, chosen), device=device)  # the last one has nothing
    weights = ops.dequantize(blocks, QType.Q8_0)
    want = torch.einsum("tk,tcnk->tcn", x, weights[ids])
    got = multiply_by_experts(x, blocks, ids.to(torch.int32), QType.Q8_0)
    assert got.shape == (tokens, chosen, n)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- diffusers ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_diffusers(device: str, with_bias: bool) -> None:
    pytest.importorskip("diffusers")
    gguf = pytest.importorskip("gguf")
    utils = importlib.import_module("diffusers.quantizers.gguf.utils")
    from quantgemm.integrations import diffusers as ours

    blocks = blocks_of(48, 64, 3, QType.Q4_0).to(device)
    layer = utils.GGUFLinear(64, 48, bias=with_bias, compute_dtype=torch.float32, device=device)
    layer.to(device)
    layer.weight = utils.GGUFParameter(blocks, quant_type=gguf.GGMLQuantizationType.Q4_0)
    x = torch.randn(2, 5, 64, device=device)
    want = x @ ops.dequantize(blocks, QType.Q4_0).T
    want = want if layer.bias is None else want + layer.bias
    theirs = layer(x)  # decoded in float16
    torch.testing.assert_close(theirs, want, rtol=1e-2, atol=1e-2)
    other = utils.GGUFLinear(64, 48, compute_dtype=torch.float32)  # not quantised
    plain = other(x.cpu())
    ours.enable()
    try:
        assert ours.is_enabled()
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
        assert type(layer(x)) is torch.Tensor
        assert torch.equal(other(x.cpu()), plain)
    finally:
        ours.disable()
    assert torch.equal(layer(x), theirs)


# ---- peft ----


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 64)
        self.first = torch.nn.Linear(64, 64)
        self.second = torch.nn.Linear(64, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.second(torch.relu(self.first(self.embed(ids))))
        return hidden


@pytest.mark.parametrize("device", DEVICES)
def test_lora_over_quantised_weights(device: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from quantgemm.integrations.peft import over_quantized

    torch.manual_seed(0)
    model, _ = replace_linear(Tiny(), "Q8_0")
    twin = Tiny()  # the same numbers, dequantised
    twin.load_state_dict(
        {
            name: model.get_submodule(name.removesuffix(".weight")).dequantize()
            if name in ("first.weight", "second.weight")
            else value
            for name, value in model.state_dict().items()
            if not name.endswith("weight_type")
        }
    )
    config = {"r": 4, "target_modules": ["first", "second"], "lora_alpha": 8}
    tuned = peft.get_peft_model(model, over_quantized(peft.LoraConfig(**config))).to(device)
    plain = peft.get_peft_model(twin, peft.LoraConfig(**config)).to(device)
    sides = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(sides) == 4 and all("lora_" in name for name in sides)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name in sides:
                p.copy_(torch.randn(p.shape, device=device) / 8)
                sides[name].copy_(p)
    ids, target = torch.arange(16, device=device), torch.arange(16, device=device).flip(0)
    losses = [torch.nn.functional.cross_entropy(m(ids), target) for m in (tuned, plain)]
    for loss in losses:
        loss.backward()
    for name, p in plain.named_parameters():
        if name in sides:
            torch.testing.assert_close(sides[name].grad, p.grad, rtol=1e-3, atol=1e-5)
    optimizer = torch.optim.Adam(sides.values(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(tuned(ids), target)
        loss.backward()
        optimizer.step()
    assert loss < losses[0] / 4
    with pytest.raises(NotImplementedError, match=r"merge: the weights are Q8_0 blocks"):
        tuned.merge_adapter()
    tuned.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["r"] == 4 and (tmp_path / "adapter_model.safetensors").exists()


def test_lora_says_what_it_cannot_do() -> None:
    peft = pytest.importorskip("peft")
    from quantgemm.integrations.peft import over_quantized

    with pytest.raises(TypeError, match=r"config: expected a peft.LoraConfig, got dict"):
        over_quantized({})
    layers = torch.nn.Sequential(QuantLinear(32, 32, "Q8_0"), QuantEmbedding(4, 32, "Q8_0"))
    config = peft.LoraConfig(target_modules=["1"])
    with pytest.raises(NotImplementedError, match=r"target_modules: .* got a QuantEmbedding"):
        peft.get_peft_model(layers, over_quantized(config))
    with pytest.raises(NotImplementedError, match=r"use_dora: expected False"):
        over_quantized(peft.LoraConfig(target_modules=["0"], use_dora=True))


# ---- transformers' generate on a quantised cache ----


def tiny_llama(device: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 64}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(**(sizes | {"max_position_embeddings": 512} | changes))
    config._attn_implementation = "sdpa"
    return transformers.LlamaForCausalLM(config).to(device, torch.float16).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 2])
def test_generate_on_a_cache_that_has_packed_nothing_yet(device: str, batch: int) -> None:
    from quantgemm.integrations.transformers_cache import quantized_cache

    model = tiny_llama(device)
    ids = torch.randint(64, (batch, 7), device=device)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    plain = model.generate(ids, **options)
    cache = quantized_cache(model, "dense2", max_tokens=64, batch=batch, window=64)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), plain)
    assert cache.get_seq_length() == 7 + 12 - 1
    assert torch.equal(model.generate(ids, **options), plain)  # without the cache: torch's


@pytest.mark.parametrize("device", DEVICES)
def test_logits_on_a_packed_cache(device: str) -> None:
    from quantgemm.integrations.transformers_cache import quantized_cache

    model = tiny_llama(device)
    ids = torch.randint(64, (1, 300), device=device)
    with torch.no_grad():
        want = model(ids).logits
        errors = {}
        for kind in ("dense4", "dense2", "bitmap2", "dense4/bitmap2"):
            key, _, value = kind.partition("/")
            options = {"value_format": value or key, "max_tokens": 320, "window": 64}
            cache = quantized_cache(model, key, **options)
            parts = [ids[:, :200], ids[:, 200:290], *ids[:, 290:].split(1, 1)]  # and tokens
            got = [model(part, past_key_values=cache).logits for part in parts]
            torch.testing.assert_close(got[0], want[:, :200], rtol=1e-2, atol=1e-2)
            errors[kind] = float((torch.cat(got, 1) - want)[:, 290:].float().norm())
            errors[kind] /= float(want[:, 290:].float().norm())
    assert 0 < errors["dense4"] < errors["dense2"] < 0.2 and errors["bitmap2"] < 0.4
    assert errors["dense4"] < errors["dense4/bitmap2"] < 0.3


@pytest.mark.parametrize("device", DEVICES)
def test_generate_on_pruned_pages(device: str) -> None:
    from quantgemm.integrations.transformers_cache import quantized_cache

    model = tiny_llama(device)
    ids = torch.randint(64, (2, 200), device=device)
    options = {"max_new_tokens": 90, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(ids)
    texts = []
    for _ in range(2):
        cache = quantized_cache(
            model, "bitmap2", sparsity=0.7, centre=True, max_tokens=300, batch=2, window=64
        )
        texts.append(model.generate(ids, past_key_values=cache, **options))
        assert texts[-1].shape == (2, 290) and cache.get_seq_length() == 289
        store = cache.layers[0].store
        assert store._num_pages(289) == 3 and store.key_pages.any(-1)[0, :3].all()
    assert torch.equal(*texts)


def test_a_single_token_unpacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantgemm.integrations.transformers_cache import quantized_cache

    model = tiny_llama("cpu")
    cache = quantized_cache(model, "dense2", max_tokens=320, window=64)
    with torch.no_grad():
        model(torch.randint(64, (1, 200)), past_key_values=cache)

        def dense(*_: Any) -> Any:
            raise AssertionError("the cache was unpacked")

        monkeypatch.setattr(SparseKVCache, "dense", dense)
        assert model(torch.tensor([[1]]), past_key_values=cache).logits.isfinite().all()
        with pytest.raises(AssertionError, match="unpacked"):  # a part of a prompt does
            model(torch.tensor([[1, 2]]), past_key_values=cache)


def test_cache_says_what_it_cannot_do() -> None:
    from quantgemm.integrations.transformers_cache import quantized_cache

    model = tiny_llama("cpu")
    cache = quantized_cache(model, max_tokens=32)
    with pytest.raises(ValueError, match=r"past_key_values: the cache is for batch 1, got 2"):
        model(torch.zeros(2, 3, dtype=torch.long), past_key_values=cache)
    padded = torch.tensor([[0, 1, 1], [1, 1, 1]])
    cache = quantized_cache(model, max_tokens=32, batch=2)
    ids, options = torch.ones(2, 3, dtype=torch.long), {"max_new_tokens": 3, "pad_token_id": 0}
    with pytest.raises(NotImplementedError, match=r"attention_mask: expected none"):
        model.generate(ids, attention_mask=padded, past_key_values=cache, **options)
    with pytest.raises(NotImplementedError, match=r"format|key_format: expected one of dense2"):
        quantized_cache(model, "bitmap3", max_tokens=32)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(NotImplementedError, match=r"expected full attention .* got sliding_att"):
        quantized_cache(model, max_tokens=32)
