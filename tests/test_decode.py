# SPDX-License-Identifier: MIT
"""compile_decode: the recorded steps say what the model says, token by token."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("gguf", reason="PyPI gguf, which knows the names, is not installed")

from tiny_models import make
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from quantgemm import QType, QuantLinear, ops, replace_linear
from quantgemm.integrations.transformers_cache import quantized_cache
from quantgemm.later import computed, rotate, rotation_of, rotations_wait
from quantgemm.models import compile_decode, fuse
from quantgemm.models.angles import RotaryTables
from quantgemm.models.fuse import fuse_steps
from quantgemm.nn import alike_rows
from quantgemm.read_ahead import ReadAhead
from quantgemm.sampling import NgramDraft, SamplingConfig, speculative_generate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
GREEDY = SamplingConfig(temperature=0)
Q4_0 = QType.Q4_0


def tiny(device: str, case: str = "llama", dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    """Packed on a GPU, as `load_model` has it."""
    model = make(case, **({"head_dim": 64, "max_position_embeddings": 256} | more))
    replace_linear(model, "Q8_0", progress=False)
    return packed(model.to(device, dtype).eval()) if device == "cuda" else model.to(dtype).eval()


def packed(model: Any) -> Any:
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.pack()
    return model


def prompts(device: str, batch: int = 1, tokens: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 96, (batch, tokens), generator=generator).to(device)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "mistral"])
def test_logits_are_the_models(device: str, case: str, pack: bool) -> None:
    model = packed(tiny(device, case)) if pack else tiny(device, case)
    ids = prompts(device, 2, 30)
    with torch.no_grad():
        want = model(ids).logits
    decoder = compile_decode(model, max_tokens=64)
    got = [decoder.read(ids[:, :10]).clone()]
    got += [decoder.step(ids[:, i]).clone() for i in range(10, 30)]
    for i, row in enumerate(got):
        difference = (row - want[:, 9 + i]).float().norm() / want[:, 9 + i].float().norm()
        assert difference < 0.03, (i, float(difference))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [GREEDY, SamplingConfig(0.9, 20, 0.9, seed=5)])
def test_text_is_that_of_plain_sampling(device: str, config: SamplingConfig) -> None:
    model = tiny(device, dtype=torch.float16)
    ids = prompts(device)[0]
    decoder = compile_decode(model, max_tokens=128, batch_sizes=(1,))
    told: list[int] = []
    text = decoder.generate(ids, 40, config, (), lambda b, new: told.extend(new))[0]
    # A step with all tokens read anew, in the order of the other's roundings up to the last bit.
    plain = speculative_generate(model, NgramDraft(), ids, 40, 0, config).tokens[0]
    assert told == text and len(text) == 40
    same = next((i for i, (a, b) in enumerate(zip(text, plain, strict=True)) if a != b), 40)
    assert same >= 10  # where two tokens are equally likely, roundings decide
    assert decoder.generate(ids, 40, config, ())[0] == text  # the same graph again


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_and_its_ends(device: str) -> None:
    model = tiny(device)
    decoder = compile_decode(model, max_tokens=64)
    ids = prompts(device, 3)
    texts = decoder.generate(ids, 20, GREEDY, ())
    alone = [decoder.generate(row, 20, GREEDY, ())[0] for row in ids]
    assert [t[:3] for t in texts] == [t[:3] for t in alone]
    end = texts[1][4]
    cut = decoder.generate(ids, 20, GREEDY, end)
    for text, short in zip(texts, cut, strict=True):
        stop = text.index(end) + 1 if end in text else 20
        assert short == text[:stop]
    model.generation_config.eos_token_id = [end]
    assert decoder.generate(ids, 20, GREEDY) == cut
    assert decoder.generate(ids, 0) == [[], [], []]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv", ["dense4", "dense2", "bitmap4", "bitmap2", "4of8_4", "4of8_2"])
def test_quantised_keys_and_values(device: str, kv: str) -> None:
    model = tiny(device)
    ids = prompts(device, 1, 250)
    with torch.no_grad():
        want = model(ids).logits[0, 189:].float()
    decoder = compile_decode(model, max_tokens=256, kv=kv, window=64, sinks=4)
    got = [decoder.read(ids[:, :190]).clone()]
    got += [decoder.step(ids[:, i]).clone() for i in range(190, 250)]  # pages leave on the way
    error = float((torch.cat(got).float() - want).norm() / want.norm())
    assert error < {"dense4": 0.1, "dense2": 0.3}.get(kv, 0.5)
    plain = compile_decode(model, max_tokens=256)
    plain.prepare(1)
    assert decoder.kv_bytes < plain.kv_bytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_several_tokens_at_once_and_forgotten_ones(device: str, case: str) -> None:
    """A step of several tokens says what as many steps say, also where others were taken back."""
    model = tiny(device, case)
    ids, others = prompts(device, 2, 30), prompts(device, 2, 60)[:, 30:]
    with torch.no_grad():
        want = model(ids).logits
    decoder = compile_decode(model, max_tokens=40)
    got = [decoder.read(ids[:, :10])[:, None].clone()]
    for start, count in ((10, 4), (14, 1), (15, 4), (19, 7), (26, 4)):
        # Drafts that are refused, recorded in the midst of a text when they first come.
        decoder.step(others[:, start : start + 3])
        decoder.forget(2, batch=2)
        decoder.forget(1, batch=2)
        got.append(decoder.step(ids[:, start : start + count]).clone())
    for i, row in enumerate(torch.cat(got, 1).unbind(1)):
        difference = (row - want[:, 9 + i]).float().norm() / want[:, 9 + i].float().norm()
        assert difference < 0.03, (i, float(difference))
    assert decoder._texts[2].tokens_read == 30
    with pytest.raises(ValueError, match="the cache is full, it holds 40 tokens; 30 are there"):
        decoder.step(others[:, :11])
    with pytest.raises(ValueError, match="tokens: expected 1 to 16, got 17"):
        compile_decode(model, max_tokens=40).prepare(1, 17)
    with pytest.raises(ValueError, match="tokens: expected 0 to 29, got 30"):
        decoder.forget(30, batch=2)


@pytest.mark.cuda
def test_an_old_graph_that_becomes_garbage_while_another_is_recorded() -> None:
    model, ids = tiny("cuda", "llama"), prompts("cuda", 1, 20)
    old = [compile_decode(model, max_tokens=64)]
    old[0].read(ids[:, :10])
    want = old[0].step(ids[:, 10]).clone()

    def drop(*_: object) -> None:
        if old and torch.cuda.is_current_stream_capturing():
            cycle: list[object] = [old.pop()]
            cycle.append(cycle)
            del cycle
            assert len([[] for _ in range(5000)]) == 5000  # enough for a collection

    new = compile_decode(model, max_tokens=64)
    hook = model.register_forward_pre_hook(drop)
    try:
        new.read(ids[:, :10])
        got = new.step(ids[:, 10])
    finally:
        hook.remove()
    assert not old and torch.equal(got, want)


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "mistral", "long"])
def test_steps_of_up_to_eight_tokens_change_no_bit(case: str) -> None:
    """So that a greedy text is the same with drafts, however close two tokens are."""
    # Rows so long that `auto` would take another kernel for two tokens than for one.
    model = tiny("cuda", intermediate_size=8704) if case == "long" else tiny("cuda", case)
    ids = prompts("cuda", 1, 60)
    alone, several = (compile_decode(model, max_tokens=64) for _ in range(2))
    for decoder in (alone, several):
        decoder.read(ids[:, :10])
    at = 10
    for count in (8, 5, 1, 2, 7, 3, 8, 4, 6):
        got = several.step(ids[:, at : at + count])
        for i in range(count):
            want = alone.step(ids[:, at + i])
            assert torch.equal(got[:, i], want), f"token {i} of {count} from {at} on"
        at += count


@pytest.mark.parametrize("device", DEVICES)
def test_alike_rows_are_of_steps_alone(device: str) -> None:
    layer = next(m for m in tiny(device).modules() if isinstance(m, QuantLinear))
    assert layer.packed_algo == "auto"
    with alike_rows():
        assert layer.packed_algo == ("gemv" if device == "cuda" else "auto")
    assert layer.packed_algo == "auto"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["ngram", "similar"])
@pytest.mark.parametrize("config", [GREEDY, SamplingConfig(0.9, 20, 0.9, seed=5)])
def test_speculation_with_recorded_steps(device: str, kind: str, config: SamplingConfig) -> None:
    """However many tokens are left for the last step: the cache has room for the text alone."""
    model = tiny(device, dtype=torch.float16)
    draft: Any = NgramDraft()
    if kind == "similar":
        draft = compile_decode(tiny(device, dtype=torch.float16), max_tokens=128)
    ids = prompts(device)[0]
    decoder = compile_decode(model, max_tokens=9 + 40)  # no room for drafts at the end
    told: list[int] = []
    result = speculative_generate(
        decoder, draft, ids, 40, 3, config, on_tokens=lambda b, new: told.extend(new)
    )
    assert told == result.tokens[0] and len(told) == 40
    if config is GREEDY:
        text = decoder.generate(ids, 40, config, ())[0]
        same = next((i for i, (a, b) in enumerate(zip(text, told, strict=True)) if a != b), 40)
        # On the CPU roundings decide where two tokens are equally likely; a GPU rounds the same.
        assert same >= (40 if device == "cuda" else 10)
    statistics = result.statistics
    assert statistics.emitted == 40 and statistics.steps <= 40
    if kind == "similar" and config is GREEDY:
        assert statistics.tokens_per_step > 2
    for count in (37, 38, 39, 40):
        short = compile_decode(model, max_tokens=9 + count) if device == "cpu" else decoder
        again = speculative_generate(short, draft, ids, count, 3, config)
        assert again.tokens[0] == result.tokens[0][:count] or config is not GREEDY
        assert len(again.tokens[0]) == count
    again = speculative_generate(decoder, draft, ids, 40, 3, config)
    assert again.tokens == result.tokens


def test_norms_are_fused_only_where_that_is_the_same() -> None:
    model = tiny("cpu")
    other, untouched = copy.deepcopy(model), copy.deepcopy(model)
    norms = 2 * model.config.num_hidden_layers + 1
    assert fuse_steps(model)[0] == norms
    assert fuse_steps(model) == (0, 0, 0, 0, 0)  # they are
    x = torch.randn(3, model.config.hidden_size).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(model.model.norm(x), untouched.model.norm(x), rtol=2**-7, atol=0)

    class ShiftedRMSNorm(type(other.model.norm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.new_tensor(0.25)  # type: ignore[no-any-return]

    other.model.norm.__class__ = ShiftedRMSNorm
    assert fuse_steps(other)[0] == norms - 1
    assert torch.equal(other.model.norm(x), ShiftedRMSNorm.forward(other.model.norm, x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gated_products_are_fused_only_where_that_is_the_same(
    dtype: torch.dtype, device: str
) -> None:
    model = packed(tiny(device, dtype=dtype))
    plain, other, shared = (copy.deepcopy(model) for _ in range(3))
    layers = model.config.num_hidden_layers
    assert fuse_steps(model).gates == layers
    x = torch.randn(3, model.config.hidden_size, device=device).to(dtype)
    mine, theirs = model.model.layers[0].mlp, plain.model.layers[0].mlp
    with torch.no_grad():
        want, got = theirs(x), mine(x)
        torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(want.abs().max()))
        assert not torch.equal(got, want)  # rounded once, not four times
        mine.up_proj.unpack()
        torch.testing.assert_close(mine(x), want, rtol=0, atol=0.02 * float(want.abs().max()))
    grown = x.clone().requires_grad_()
    theirs(grown).sum().backward()
    again = x.clone().requires_grad_()
    mine(again).sum().backward()
    torch.testing.assert_close(again.grad, grown.grad)

    for mlp in (layer.mlp for layer in other.model.layers):
        mlp.act_fn = torch.nn.GELU()
    other_want = other.model.layers[0].mlp(x)
    assert fuse_steps(other).gates == 0
    assert torch.equal(other.model.layers[0].mlp(x), other_want)

    shared.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _, __, y: 2 * y)
    shared.model.layers[1].mlp.gate_proj.unpack()
    assert fuse_steps(shared).gates == layers - 2


@pytest.mark.parametrize("device", DEVICES)
def test_queries_keys_and_values_are_one_product(device: str) -> None:
    model = tiny(device, dtype=torch.float16)
    plain = packed(copy.deepcopy(model))
    attention = packed(model).model.layers[1].self_attn
    attention.v_proj = QuantLinear.from_linear(
        torch.nn.Linear(attention.v_proj.in_features, attention.v_proj.out_features, bias=False),
        "Q4_0",
    ).to(device)
    attention.v_proj.pack()
    plain.model.layers[1].self_attn.v_proj = copy.deepcopy(attention.v_proj)
    layers = model.config.num_hidden_layers
    rows = {name: x.clone() for name, x in model.state_dict().items()}
    assert fuse_steps(model).heads == 3 * layers  # one of another type among them
    for name, x in model.state_dict().items():
        assert torch.equal(x, rows[name]), name
    x = torch.randn(2, 3, model.config.hidden_size, device=device).half()

    def check(layer: int, *names: str) -> None:
        mine, theirs = (m.model.layers[layer].self_attn for m in (model, plain))
        for name in names:
            want = getattr(theirs, name)(x)
            close = {"rtol": 2e-3, "atol": 2e-3 * float(want.abs().max())}
            torch.testing.assert_close(getattr(mine, name)(x), want, **close)

    with torch.no_grad():
        check(0, "q_proj", "k_proj", "v_proj")
        check(1, "q_proj", "k_proj", "v_proj")
        check(0, "k_proj", "q_proj", "q_proj", "v_proj", "v_proj", "k_proj")  # in any order
        x = x + 1
        check(0, "k_proj")  # what q saw was another x
    check(0, "q_proj", "k_proj", "v_proj")  # with gradients
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.unpack()
        check(0, "q_proj", "k_proj", "v_proj")
        model.model.layers[2].self_attn.q_proj.register_forward_hook(lambda _, __, y: 2 * y)
        doubled = model.model.layers[2].self_attn.q_proj(x)
        want = plain.model.layers[2].self_attn.q_proj(x)
        torch.testing.assert_close(doubled, 2 * want, rtol=2e-3, atol=4e-3)
        other = copy.deepcopy(model)
        for layer in model.model.layers[2].self_attn.children():
            if isinstance(layer, QuantLinear):
                layer.weight.data.zero_()
        model = other  # a copy has its own weights
        check(2, "k_proj", "v_proj")


def test_copies_of_a_fused_model_have_their_own_weights(tmp_path: Path) -> None:
    model = tiny("cpu")
    fuse_steps(model)
    other = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    x = torch.randn(3, model.config.hidden_size).bfloat16()
    with torch.no_grad():
        want = model.model.norm(x)
        other.model.norm.weight.mul_(2)
        assert torch.equal(other.model.norm(x), 2 * want) and torch.equal(model.model.norm(x), want)
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(loaded.model.norm(x), want)
        wide = copy.deepcopy(model.model.norm).double()
        assert wide(x.double()).dtype == torch.float64  # no kernel for it: the model's own


def test_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    model = tiny("cpu")
    torch.manual_seed(0)
    fuse_steps(model)
    assert torch.equal(torch.rand(3), want)


def test_gradients_flow_through_fused_steps() -> None:
    model = tiny("cpu", dtype=torch.float32)
    ids = prompts("cpu")
    before = model(ids, labels=ids).loss
    fuse_steps(model)
    loss = model(ids, labels=ids).loss
    assert torch.equal(loss, before)
    loss.backward()
    assert model.model.norm.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=ids).loss, before, rtol=1e-5, atol=1e-6)


def test_mistakes() -> None:
    model = tiny("cpu")
    with pytest.raises(TypeError, match=r"model: expected torch.float16 or .* got torch.float32"):
        compile_decode(tiny("cpu", dtype=torch.float32))
    with pytest.raises(ValueError, match=r"max_tokens: expected 1 to 256, the context, got 257"):
        compile_decode(model, 257)
    with pytest.raises(ValueError, match=r"window: only with kv"):
        compile_decode(model, 64, window=64)
    with pytest.raises(NotImplementedError, match=r"key_format: expected one of dense2"):
        compile_decode(model, 64, kv="dense3", batch_sizes=(1,))
    with pytest.raises(NotImplementedError, match=r"expected full attention .* sliding_attention"):
        compile_decode(tiny("cpu", "gemma2", head_dim=64), 64, batch_sizes=(1,))
    with pytest.raises(NotImplementedError, match=r"rotary embedding \(longrope\)"):
        compile_decode(make("phi3-long").bfloat16(), 64)
    decoder = compile_decode(model, 16)
    ids = prompts("cpu", 1, 10)
    with pytest.raises(ValueError, match=r"prompts: expected at most 16 tokens, got 20"):
        decoder.read(torch.ones(1, 20, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"prompts: expected ids \[batch, tokens\], got \[10\]"):
        decoder.read(ids[0])
    with pytest.raises(ValueError, match=r"tokens: expected ids \[batch\] or .* that read\(\)"):
        decoder.step(ids[:, 0])
    with pytest.raises(ValueError, match=r"tokens: expected 0 to 0, got 1"):
        decoder.forget(1)
    with pytest.raises(ValueError, match=r"prompts: expected one for a compiled model, got 2"):
        speculative_generate(decoder, NgramDraft(), list(prompts("cpu", 2)), 3)
    packed = compile_decode(model, 64, kv="dense4", window=16)
    with pytest.raises(ValueError, match=r"a compiled model: .* got kv='dense4'"):
        speculative_generate(decoder, packed, prompts("cpu")[0], 3)
    with pytest.raises(NotImplementedError, match=r"tokens: expected 1 where .* are dense4, got 3"):
        packed.prepare(1, 3)
    with pytest.raises(ValueError, match=r"max_new_tokens: the cache holds 16 tokens, got 10 \+ 8"):
        decoder.generate(ids, 8)
    assert len(decoder.generate(ids, 7, GREEDY, ())[0]) == 7
    with pytest.raises(ValueError, match=r"tokens: the cache is full, it holds 16 tokens"):
        decoder.step(ids[:, 0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_inside_of_products(dtype: torch.dtype, device: str) -> None:
    """What a layer adds is added before the product is rounded, and nowhere else."""
    model = packed(tiny(device, "llama", dtype))
    layers = model.config.num_hidden_layers
    assert fuse_steps(model).sums == 2 * layers and fuse_steps(model).sums == 0
    down = model.model.layers[0].mlp.down_proj
    x = torch.randn(1, 3, down.in_features, device=device).to(dtype)
    residual = torch.randn(1, 3, down.out_features, device=device).to(dtype)
    sizes = down.qtype, down.out_features, down.in_features
    with torch.no_grad():
        product = ops.gemm_packed(x, down.weight, *sizes)
        want = ops.gemm_packed(x, down.weight, *sizes, residual=residual)
        assert torch.equal(residual + down(x), want) and torch.equal(down(x) + residual, want)
        assert torch.equal(torch.add(residual, down(x)), want)
        lazy = down(x)
        assert lazy.shape == product.shape and lazy.dtype == dtype and lazy.device == x.device
        for use in (
            lambda y: y,
            lambda y: y * residual,
            lambda y: torch.add(residual, y, alpha=2),
            lambda y: residual[:, :1] + y,  # another shape
            lambda y: y + residual.double(),
            lambda y: y + 1,
            lambda y: torch.cat([y, y]),
            lambda y: y[:, 1:].mul_(2),
            lambda y: copy.deepcopy(y),
        ):
            got, expected = use(down(x)), use(product.clone())
            assert got.dtype == expected.dtype and torch.equal(got, expected)
        both = down(x)
        assert torch.equal(both * 1, product)  # and then as torch adds
        assert torch.equal(residual + both, residual + product)
        assert torch.equal(residual + (residual + down(x)), residual + want)
        assert torch.equal(down(x) + down(x), product + product)

        seen = []
        hook = down.register_forward_hook(lambda _, __, y: seen.append(y * 1))
        logits = [model(prompts(device, 1, 3), use_cache=False).logits]
        hook.remove()
        logits += [model(prompts(device, 1, 3), use_cache=False).logits]
        assert len(seen) == 1 and torch.allclose(*logits, atol=0.05 * float(logits[0].abs().max()))

        if device == "cpu":
            compiled = torch.compile(lambda x: residual + down(x), backend="eager")
            assert torch.equal(compiled(x), residual + product)
        y = down(x)
        with torch.autocast(device, torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
            assert type(down(x)) is torch.Tensor and torch.equal(y.clone(), product)
        y = down(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="x of a product was written to before its output"):
            residual + y
        assert type(down(x.repeat(1, 3, 1))) is torch.Tensor  # many tokens
    x.requires_grad_()
    (residual + down(x)).sum().backward()
    assert x.grad is not None


@pytest.mark.cuda
def test_launches_of_a_recorded_step() -> None:
    """A sum inside of a product is no launch."""
    model = packed(tiny("cuda"))
    fuse_steps(model)
    products = [
        m for m in model.modules() if type(m.__dict__.get("forward")).__name__ == "_Summand"
    ]
    counts = []
    for fused in (True, False):
        if not fused:
            for product in products:
                product.forward = partial(QuantLinear.forward, product)
        decoder = compile_decode(model, 64, batch_sizes=(1,))
        decoder.read(prompts("cuda"))
        token = torch.ones(1, dtype=torch.int64, device="cuda")
        for _ in range(2):  # a process's first one may have more in it
            with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
                decoder.step(token)
                torch.cuda.synchronize()
        counts.append(sum(event.device_type == DeviceType.CUDA for event in found.events()))
    assert len(products) == 2 * model.config.num_hidden_layers
    assert counts[1] - counts[0] == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("device", DEVICES)
def test_products_know_what_is_read_next(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hints: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    plain = ReadAhead.follow

    def follow(self: ReadAhead, packed: torch.Tensor) -> torch.Tensor | None:
        hints.append((packed, plain(self, packed)))
        return hints[-1][1]

    monkeypatch.setattr(ReadAhead, "follow", follow)
    weights = [
        ops.pack(ops.quantize(torch.randn(n, 256, device=device), Q4_0), Q4_0)
        for n in (64, 128, 192)
    ]
    x = torch.randn(1, 256, device=device).bfloat16()

    def step() -> list[torch.Tensor]:
        first, second, third = weights
        y = [ops.gemm_packed(x, first, Q4_0, 64, 256)]
        y += [ops.gemm_packed_gated(x, second, second.clone(), Q4_0, 128, 256)]
        return [*y, ops.gemm_packed(x, third, Q4_0, 192, 256)]

    want = step()
    assert not hints
    ahead = ReadAhead()
    for _ in range(2):
        with ahead:
            assert all(map(torch.equal, step(), want))
    seen, told = zip(*hints, strict=True)
    assert all(a is b for a, b in zip(seen, weights * 2, strict=True))
    assert told[:3] == (None, None, None)
    assert all(a is b for a, b in zip(told[3:], [*weights[1:], weights[0]], strict=True))
    step()
    assert len(hints) == 6

    with pytest.raises(TypeError, match=r"ahead: expected uint8, got torch\.float32"):
        ops.gemm_packed(x, weights[0], Q4_0, 64, 256, ahead=torch.zeros(16, device=device))
    with pytest.raises(ValueError, match="ahead: expected packed weights, contiguous"):
        ops.gemm_packed(x, weights[0], Q4_0, 64, 256, ahead=weights[1].t())
    strided, misaligned = weights[1].t().contiguous().t(), weights[1].view(-1)[1:]
    for odd in (strided, misaligned):  # products may be given such weights, hints may not
        fresh = ReadAhead()
        fresh.follow(weights[0])
        fresh.follow(odd)
        assert fresh.follow(weights[0]) is None and fresh.follow(odd) is weights[0]
    for count in (0, 16, 2100):  # less than a block's part, and parts that are no multiple of 16
        few = torch.zeros(count, dtype=torch.uint8, device=device)
        assert torch.equal(ops.gemm_packed(x, weights[0], Q4_0, 64, 256, ahead=few), want[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_angles_are_looked_up_in_steps_alone(device: str, case: str) -> None:
    """The model's own bits, at any position, and its own forward again afterwards."""
    model = tiny(device, case, dtype=torch.bfloat16)
    rotary = next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    tables = RotaryTables(model, 80)
    assert len(tables.tables) == 1
    x, ids = torch.zeros(1, dtype=torch.bfloat16, device=device), prompts(device, 3, 7) % 80
    want = rotary(x, position_ids=ids)
    with tables:
        assert "forward" in rotary.__dict__
        got = rotary(x, position_ids=ids)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert "forward" not in rotary.__dict__
    rotary.inv_freq[0] *= 2  # what depends on more than positions is left alone
    plain = type(rotary).forward

    class LengthRotaryEmbedding(type(rotary)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            return plain(self, x, position_ids * position_ids.max())

    rotary.__class__ = LengthRotaryEmbedding
    assert RotaryTables(model, 80).tables == []


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_failed_changes_nothing(device: str) -> None:
    """The lengths of all layers are one tensor, which the last layer changes."""
    model = tiny(device)
    ids = prompts(device, 1, 20)
    cache = quantized_cache(model, "dense4", max_tokens=64)
    store = cache.layers[0].store
    assert all(layer.store is store for layer in cache.layers) and len(store.lens) == 1

    def read(token: slice) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(ids[:, token], past_key_values=cache).logits[:, -1]
        return logits

    read(slice(0, 12))
    assert store.lens.tolist() == [12] and cache.get_seq_length() == 12
    last = model.model.layers[-1]
    handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(slice(12, 13))
    handle.remove()
    assert store.lens.tolist() == [12]
    for layer in cache.layers:  # the host counts as the layers are called
        layer.tokens = 12
    got = read(slice(12, 13))
    assert store.lens.tolist() == [13]
    cache = quantized_cache(model, "dense4", max_tokens=64)
    store = cache.layers[0].store
    read(slice(0, 12))
    assert torch.equal(got, read(slice(12, 13)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["llama", "qwen3"])
@pytest.mark.parametrize("count", [1, 3])
def test_rotations_wait_for_the_cache(
    device: str, case: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, and in a step nothing but the cache rotates."""
    model = tiny(device, case)
    ids = prompts(device, 1, 10 + count)
    got, rotated, plain = [], [0], ops.rotary

    def counted(*of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotated[0] += 1
        return plain(*of)

    for waits in (True, False):
        if not waits:
            monkeypatch.setattr("quantgemm.models.decode.rotations_wait", nullcontext)
        decoder = compile_decode(model, max_tokens=64, batch_sizes=(2,))  # looks at rotations once
        with monkeypatch.context() as counting:
            counting.setattr(ops, "rotary", counted)
            decoder.prepare(1, count)  # a GPU's step runs here
        decoder.read(ids[:, :10])
        with monkeypatch.context() as counting:
            counting.setattr(ops, "rotary", counted)
            got.append(decoder.step(ids[:, 10:]).clone())
        assert (rotated[0] > 0) == (not waits)
    assert torch.equal(*got)


@pytest.mark.parametrize("device", DEVICES)
def test_whoever_uses_a_rotation_has_it_computed(device: str) -> None:
    q, k = (torch.randn(1, heads, 3, 64, device=device).bfloat16() for heads in (4, 2))
    angles = torch.randn(2, 1, 3, 64, device=device).bfloat16().unbind()
    want = ops.rotary(q, k, *angles)
    with torch.no_grad(), rotations_wait():
        for use in (
            lambda x: x,
            lambda x: x * 2,
            lambda x: x.transpose(1, 2)[:, 1:],
            lambda x: torch.cat([x, x]),
            lambda x: copy.deepcopy(x),
        ):
            sides = rotate(q, k, *angles)
            assert [s.shape for s in sides] == [q.shape, k.shape] and rotation_of(*sides)
            assert rotation_of(*sides[::-1]) is None and rotation_of(q, sides[1]) is None
            assert rotation_of(sides[0], rotate(q, k, *angles)[1]) is None
            for side, expected in zip(sides, want, strict=True):
                assert torch.equal(use(side), use(expected))
            assert rotation_of(*sides) is None
            assert all(map(torch.equal, map(computed, sides), want))
        query, _ = rotate(q, k, *angles)
        k.add_(1)
        with pytest.raises(RuntimeError, match="rotary: queries, keys or angles were written to"):
            query + 1
        x = torch.randn(1, 4, 9, 64, device=device).bfloat16()
        query, key = rotate(x, x[:, :2], *(torch.cat([a] * 3, 1) for a in angles))
        attention = torch.nn.functional.scaled_dot_product_attention
        out = attention(query, key, x[:, :2], is_causal=True, enable_gqa=True)
        assert type(out) is torch.Tensor and out.shape == x.shape
    assert type(rotate(q, k, *angles)[0]) is torch.Tensor


@pytest.mark.cuda
@pytest.mark.parametrize("room", [64, 256])
def test_small_launches_of_a_layer(room: int) -> None:
    """Rotary embedding and append are one, attention is one, whose parts no launch merges."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no clusters of blocks")
    model = packed(tiny("cuda"))
    decoder = compile_decode(model, room, batch_sizes=(1,))
    decoder.read(prompts("cuda"))
    token = torch.ones(1, dtype=torch.int64, device="cuda")
    for _ in range(2):  # a process's first one may have more in it
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
            decoder.step(token)
            torch.cuda.synchronize()
    names = [e.name for e in found.events() if e.device_type == DeviceType.CUDA]
    layers = model.config.num_hidden_layers
    for part, count in (("append_", 1), ("attention_", 1), ("rotary_", 0), ("merge_", 0)):
        found_names = [n for n in names if part + "kernel" in n or part + "few" in n]
        assert len(found_names) == count * layers, names


def mixed(device: str) -> Any:
    """v of layer 1 is of another type than q and k."""
    model = tiny(device)
    attention = model.model.layers[1].self_attn
    cols, rows = attention.v_proj.in_features, attention.v_proj.out_features
    other = QuantLinear.from_linear(torch.nn.Linear(cols, rows, bias=False), "Q4_0")
    attention.v_proj = other.to(device, torch.bfloat16)
    return packed(model)


def close_to(want: torch.Tensor) -> dict[str, Any]:
    return {"rtol": 0, "atol": 0.02 * float(want.abs().max())}


@pytest.mark.parametrize("device", DEVICES)
def test_norms_inside_of_products(device: str) -> None:
    """They are in nobody's way: who is no product that can have one inside is given numbers."""
    model = mixed(device)
    fuse_steps(model)
    first, second, third = model.model.layers[:3]
    x = torch.randn(1, 3, model.config.hidden_size, device=device).bfloat16()
    heads = ("q_proj", "k_proj", "v_proj")

    def want_of(norm: Any, x: torch.Tensor = x) -> torch.Tensor:
        return ops.rms_norm(x, norm.weight, norm.variance_epsilon)

    with torch.no_grad():
        for layer in (first, second):
            lazy, rows = layer.input_layernorm(x), want_of(layer.input_layernorm)
            assert type(lazy) is fuse._Norm and lazy.numbers is None
            assert (lazy.shape, lazy.dtype, lazy.device) == (rows.shape, rows.dtype, rows.device)
            for name in heads:
                product = getattr(layer.self_attn, name)
                want, got = product(rows), product(lazy)
                torch.testing.assert_close(got, want, **close_to(want))
            assert lazy.numbers is None
            lazy = layer.post_attention_layernorm(x)
            want = layer.mlp(want_of(layer.post_attention_layernorm)) * 1
            torch.testing.assert_close(layer.mlp(lazy) * 1, want, **close_to(want))
            assert lazy.numbers is None

        norm, attention = first.input_layernorm, first.self_attn
        rows = want_of(norm)
        for use in (
            lambda y: y,
            lambda y: y * x,
            lambda y: x + y,
            lambda y: torch.cat([y, y]),
            lambda y: y[:, 1:].mul_(2),
            lambda y: y.view(-1),
            lambda y: copy.deepcopy(y),
            lambda y: torch.ops.quantgemm.rms_norm(y, norm.weight, 1e-5),
            lambda y: second.mlp.up_proj(y),
            lambda y: first.mlp.gate_proj(y),
            lambda y: attention.k_proj(y),  # nobody has asked q
        ):
            assert torch.equal(use(norm(x)), use(rows.clone()))
        lazy = norm(x)
        q = attention.q_proj(lazy)
        lazy.add_(1)  # k and v see that
        assert torch.equal(attention.k_proj(lazy), attention.k_proj(rows + 1))
        assert torch.equal(attention.q_proj(lazy), attention.q_proj(rows + 1))
        torch.testing.assert_close(q, attention.q_proj(rows), **close_to(q))
        z = torch.randn(1, 3, attention.o_proj.in_features, device=device).bfloat16()
        assert torch.equal(norm(x) + attention.o_proj(z), rows + attention.o_proj(z) * 1)

        third.self_attn.k_proj.unpack()
        rows = want_of(third.input_layernorm)
        lazy = third.input_layernorm(x)
        for name in heads:
            product = getattr(third.self_attn, name)
            assert torch.equal(product(lazy), product(rows)), name

        assert type(model.model.norm(x)) is torch.Tensor  # no product of a layer behind it
        assert type(norm(x.repeat(1, 3, 1))) is torch.Tensor  # many tokens
        assert type(norm(x[:, :0])) is torch.Tensor
        with torch.autocast(device, torch.float16):
            assert type(norm(x)) is torch.Tensor
        if device == "cpu":
            compiled = torch.compile(lambda x: attention.q_proj(norm(x)), backend="eager")
            assert torch.equal(compiled(x), attention.q_proj(want_of(norm)))
        lazy = norm(x)
        x.add_(1)
        for use in (attention.q_proj, first.mlp, torch.Tensor.clone):
            with pytest.raises(RuntimeError, match="x of a norm was written to before its output"):
                use(lazy)
    assert norm(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_norms_inside_of_a_model(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last norm is a launch; numbers are those of launches up to roundings."""
    model = mixed(device)
    fuse_steps(model)
    calls, norm = [], ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda *args: calls.append(1) or norm(*args))
    logits = []
    for inside in (True, False):
        if not inside:
            monkeypatch.setattr(fuse, "_can_be_inside", lambda x: False)
        calls.clear()
        with torch.no_grad():
            logits.append(model(prompts(device, 1, 3), use_cache=False).logits)
        layers = model.config.num_hidden_layers
        assert len(calls) == (1 if inside else 2 * layers + 1)
    if device == "cpu":  # it is in front there
        assert torch.equal(*logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0.05 * float(logits[0].abs().max()))
    monkeypatch.undo()
    half = packed(tiny(device, dtype=torch.float16))
    fuse_steps(half)
    x = torch.randn(1, 1, model.config.hidden_size, device=device).half()
    with torch.no_grad():
        assert type(half.model.layers[0].input_layernorm(x)) is torch.Tensor
