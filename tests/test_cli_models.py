# SPDX-License-Identifier: MIT
"""`quantgemm run` and `bench` on a tiny model: text, drafts, reports, and one line per failure."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("gguf", reason="PyPI gguf, which knows the names, is not installed")

from tiny_models import byte_level, make, write

from quantgemm import load_model, load_tokenizer, open_gguf
from quantgemm.commands.run import TextStream

PROMPT = "the blocks share the blocks share"
GREEDY = ("--device", "cpu", "--temperature", 0, "-n", 20, "--no-chat")


def save(
    path: Path, seed: int = 0, head_dim: int = 16, case: str = "llama-tied", **changed: Any
) -> Path:
    _, keys = byte_level()
    keys |= changed
    metadata = {f"tokenizer.{key.replace('__', '.')}": value for key, value in keys.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    count = len(keys["ggml__tokens"])
    metadata["tokenizer.ggml.token_type"] = [3] * 3 + [1] * (count - 3)
    model = make(case, seed, vocab_size=count, head_dim=head_dim)
    return write(path, model, case, "Q8_0", metadata)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(tmp_path / "m.gguf")


def expected(path: Path, count: int = 20) -> str:
    model, tokenizer = load_model(path, "cpu", torch.float32), load_tokenizer(path)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def shown(text: str) -> str:
    """As a terminal may be given it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def test_greedy_text(run: Cli, path: Path) -> None:
    status, out, err = run("run", path, "-p", PROMPT, *GREEDY)
    assert status == 0, err
    assert out.rstrip("\n") == shown(expected(path))
    assert "first token after" in err and "tokens/s" in err and "weights" in err
    assert "drafts accepted" not in err


def tokens() -> list[str]:
    return list(byte_level()[1]["ggml__tokens"])


def test_a_mixture_of_experts(run: Cli, tmp_path: Path) -> None:
    path = save(tmp_path / "moe.gguf", case="qwen3moe")
    status, out, err = run("run", path, "-p", PROMPT, *GREEDY, "--dtype", "float32")
    assert status == 0, err
    assert out.rstrip("\n") == shown(expected(path))
    smaller = tmp_path / "smaller.gguf"
    status, _, err = run("quantize", path, smaller, "--type", "Q4_0", "--device", "cpu")
    assert status == 0, err
    types = {name: t.format.name for name, t in open_gguf(smaller).tensors.items()}
    assert types["blk.1.ffn_down_exps.weight"] == types["blk.1.attn_q.weight"] == "Q4_0"
    assert types["blk.1.ffn_gate_inp.weight"] == "F32"
    assert run("run", smaller, "-p", PROMPT, *GREEDY)[0] == 0


def test_a_draft_with_fewer_tokens(run: Cli, path: Path, tmp_path: Path) -> None:
    small = save(tmp_path / "small.gguf", seed=3, ggml__tokens=tokens()[:300])
    want = run("run", path, "-p", PROMPT, *GREEDY)[1]
    assert run("run", path, "-p", PROMPT, *GREEDY, "--draft", small)[:2] == (0, want)


def test_drafts_change_nothing(run: Cli, path: Path, tmp_path: Path) -> None:
    want = run("run", path, "-p", PROMPT, *GREEDY)[1]
    other = save(tmp_path / "draft.gguf", seed=3)
    for draft in ("ngram", path, other):
        status, out, err = run("run", path, "-p", PROMPT, *GREEDY, "--draft", draft)
        assert status == 0 and out == want
        assert "tokens per step, drafts accepted: " in err
        if draft == path:
            assert "drafts accepted: 100% 100% 100% 100%" in err


def test_sampling_follows_the_seed(run: Cli, path: Path) -> None:
    line = ("run", path, "-p", PROMPT, "--device", "cpu", "-n", 20, "--no-chat", "--temperature", 2)
    texts = [run(*line, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert run(*line, "--seed", 1, "--top-k", 1)[1] != texts[0]


def test_chat_and_standard_input(run: Cli, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run("run", path, "-p", PROMPT, *GREEDY)
    chat = run("run", path, "-p", PROMPT, *GREEDY[:-1])
    assert chat[0] == 0 and chat[2].splitlines()[2] != plain[2].splitlines()[2]  # tokens in
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert run("run", path, "-p", "-", *GREEDY)[1] == plain[1]


def test_text_comes_in_whole_characters(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(path)
    stream = TextStream(tokenizer)
    for token in tokenizer("a 日\x1b[31m\n").input_ids:
        stream.add([token])
        assert "\ufffd" not in capsys.readouterr().out
    stream = TextStream(tokenizer)
    for token in tokenizer("a 日\x1b\n").input_ids:
        stream.add([token])
    stream.end()
    assert capsys.readouterr().out == "a 日\\x1b\n\n"


@pytest.mark.cuda
def test_bench_of_what_cannot_be_recorded(run: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", make("gemma2", head_dim=64), "gemma2", "Q8_0")
    status, out, err = run("bench", path, "--device", "cuda", "-p", 4, "-n", 4, "-r", 1)
    assert status == 0 and "tg4" in out, err
    assert "without CUDA graphs: model: expected full attention" in err


def test_bench(run: Cli, path: Path) -> None:
    status, out, err = run("bench", path, "--device", "cpu", "-p", "8,16", "-n", 4, "-r", 2)
    assert (status, err) == (0, "")
    for word in ("pp8", "pp16", "tg4", "tokens/s", "GB/s", "llama", "peak memory"):
        assert word in out
    status, out, err = run(
        "bench", path, "--device", "cpu", "-p", 0, "-n", 4, "-r", 2, "--json", "--algo", "auto_q8"
    )
    found = json.loads(out)
    assert status == 0 and [t["test"] for t in found["tests"]] == ["tg4"]
    assert len(found["tests"][0]["repetitions"]) == 2 and found["algo"] == "auto_q8"
    assert 0 < found["bytes_per_token"] <= found["bytes"]


# ------------------------------------------------------------------------------ failures


def fails(run: Cli, *argv: object) -> str:
    status, _, err = run(*argv)
    assert status == 1, err
    last = err.splitlines()[-1]
    assert last.startswith(f"quantgemm {argv[0]}: error: ")
    return last


@pytest.mark.parametrize("form", ["dense4", "bitmap2", "4of8_4", "dense4/bitmap2"])
def test_keys_and_values_in_a_format(run: Cli, tmp_path: Path, form: str) -> None:
    path = save(tmp_path / "m.gguf", head_dim=64)
    greedy = (*GREEDY, "--dtype", "float16")
    sparsity = ("--kv-sparsity", 0.7) if "bitmap2" in form else ()
    status, out, err = run("run", path, "-p", PROMPT, *greedy, "--kv", form, *sparsity)
    assert status == 0 and "keys and values" in err, err
    _, plain, _ = run("run", path, "-p", PROMPT, *greedy)
    assert out == plain  # shorter than the window: nothing is packed yet


def test_failures(run: Cli, path: Path, tmp_path: Path) -> None:
    def failing(*argv: object) -> str:
        return fails(run, "run", *argv, "--device", "cpu")

    assert "no such file" in failing(tmp_path / "none.gguf", "-p", "x")
    assert "expected some text" in failing(path, "-p", "", "--no-chat")
    assert "tokens, expected fewer than 128" in failing(path, "-p", "the " * 200)
    bare = save(tmp_path / "bare.gguf", chat_template=None)
    assert "no chat template" in failing(bare, "-p", "x", "--chat")
    broken = save(tmp_path / "broken.gguf", chat_template="{{ raise_exception('no') }}")
    assert "chat template fails" in failing(broken, "-p", "x")
    large = save(tmp_path / "large.gguf", ggml__tokens=[*tokens(), "<extra>"])
    draft = ("-p", "x", "--draft", large)
    assert "vocabulary of at most 305 tokens, got 306" in failing(path, *draft)
    other = save(tmp_path / "other.gguf", ggml__tokens=["<pad>", *tokens()[1:]])
    draft = ("-p", "x", "--draft", other)
    assert "token 0 is '<pad>', expected '<|endoftext|>'" in failing(path, *draft)
    assert "context has 128" in fails(run, "bench", path, "-p", "129", "--device", "cpu")
    for form in ((), ("--kv", "dense2")):
        last = fails(run, "run", path, "-p", "x", "--device", "cpu", "--kv-sparsity", 0.5, *form)
        assert "--kv-sparsity: only with --kv bitmap2 or --kv bitmap4" in last
    for form in ("dense3", "dense4/", "dense4/bitmap2/dense2"):
        status, _, err = run("run", path, "-p", "x", "--kv", form)
        assert status == 2 and f"4of8_4, or KEYS/VALUES, got {form!r}" in err


def test_other_architectures(run: Cli, tmp_path: Path) -> None:
    model = make("llama")
    path = write(tmp_path / "m.gguf", model, "llama", metadata={"general.architecture": "rwkv9"})
    assert "'rwkv9' is not supported" in fails(run, "bench", path, "--device", "cpu")


def test_without_transformers(run: Cli, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for line in (("run", path, "-p", "x"), ("bench", path)):
        assert "pip install 'quantgemm[hf]'" in fails(run, *line, "--device", "cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "1.5"),
        ("--top-k", "-3"),
        ("--dtype", "int8"),
        ("-n", "many"),
    ],
)
def test_arguments(run: Cli, path: Path, wrong: tuple[str, str]) -> None:
    status, _, err = run("run", path, "-p", "x", *wrong)
    assert status == 2 and wrong[0] in err
