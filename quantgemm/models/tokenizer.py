# SPDX-License-Identifier: MIT
"""load_tokenizer: a transformers tokenizer from the vocabulary that a GGUF file carries.

Two kinds are known, by `tokenizer.ggml.model`: "gpt2", byte pairs with a list of merges and a rule
for cutting text into words first (`tokenizer.ggml.pre`), and "llama", SentencePiece's byte pairs,
where the score of a piece says when it is merged and unknown characters become bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from quantgemm.gguf import GGUFError, open_gguf
from quantgemm.gguf.errors import shorten
from quantgemm.models.extras import import_transformers
from quantgemm.models.hyperparameters import Hyperparameters
from quantgemm.models.loader import resolve_model_path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
SPACE = "▁"

# How text is cut into words before pairs are merged, each alternative of a pattern on its line.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str) -> str:
    letters, marks = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return "|".join((_CONTRACTIONS, letters, digits, marks, _TAIL))


def _cased_words(digits: str, contractions: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    lower, upper = (
        f"{lead}{_UPPER}*{_LOWER}+{contractions}",
        f"{lead}{_UPPER}+{_LOWER}*{contractions}",
    )
    return "|".join((lower, upper, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _TAIL))


PATTERNS = {
    "llama-bpe": _words(r"\p{N}{1,3}"),
    "qwen2": _words(r"\p{N}"),
    "gpt-4o": _cased_words(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),
    "tekken": _cased_words(r"\p{N}", ""),
}
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # whose files may leave out that texts begin with BOS
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "dbrx": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "qwen35": "qwen2",
    "llama4": "gpt-4o",
}
GPT2 = ("default", "gpt-2", "gpt2")  # the pattern that the tokenizers library has built in
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell")  # GPT-2's after it


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """A fast transformers tokenizer, with the file's special tokens and chat template.

    path: a GGUF file or a directory that has one. Errors: GGUFError where the file has no
    vocabulary or one that cannot be built, ImportError without transformers.
    """
    transformers = import_transformers()
    hparams = Hyperparameters(open_gguf(resolve_model_path(path)))
    kind = hparams.text("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in builders:
        known = ", ".join(builders)
        raise hparams.error(
            "tokenizer.ggml.model",
            f"expected one of {known}, got {shorten(kind)}",
            "use the tokenizer of the original model",
        )
    tokens = _strings(hparams, "tokenizer.ggml.tokens")
    kinds = _token_types(hparams, len(tokens))
    try:
        tokenizer = builders[kind](hparams, tokens, kinds)
    except GGUFError:
        raise
    except Exception as error:  # the tokenizers library has no class of its own for it
        raise hparams.error(
            "tokenizer.ggml.tokens",
            f"the tokenizer cannot be built: {error}",
            "use the tokenizer of the original model",
        ) from error
    named = _named_tokens(hparams, tokens)
    _add_special_tokens(tokenizer, hparams, kind, tokens, kinds, set(named.values()))
    _add_template(tokenizer, hparams, kind, tokens)
    length = hparams.integer("context_length") if hparams.has("context_length") else None
    template = hparams.text("tokenizer.chat_template", "") or None
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **named,
        **({} if length is None else {"model_max_length": length}),
    )


def _byte_level(hparams: Hyperparameters, tokens: list[str], kinds: list[int]) -> Any:
    """Every byte is a letter of the vocabulary; merges in the order of their list."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = []
    for merge in _strings(hparams, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            wanted = "expected two pieces and a blank between them"
            raise hparams.error("tokenizer.ggml.merges", f"{wanted}, got {shorten(merge)}")
        pairs.append((left, right))
    rule = hparams.text("tokenizer.ggml.pre", "default")
    # Some vocabularies have tokens that no sequence of merges reaches.
    whole_words = rule in (*LLAMA3, "tekken")
    rule = ALIASES.get(rule, rule)
    model = models.BPE(_vocabulary(tokens), pairs, fuse_unk=False, ignore_merges=whole_words)
    tokenizer = Tokenizer(model)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in PATTERNS)
    if rule in PATTERNS:
        cut: Any = pre_tokenizers.Split(Regex(PATTERNS[rule]), "isolated", invert=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, plain])
    elif rule in DIGIT_BY_DIGIT:
        cut = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, plain])
    elif rule in GPT2:
        tokenizer.pre_tokenizer = plain
    else:
        known = ", ".join(sorted({*GPT2, *DIGIT_BY_DIGIT, *PATTERNS, *ALIASES}))
        raise hparams.error(
            "tokenizer.ggml.pre",
            f"no rule for cutting words is known by the name {shorten(rule)}, these are: {known}",
            "use the tokenizer of the original model",
        )
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(hparams: Hyperparameters, tokens: list[str], kinds: list[int]) -> Any:
    """Pieces are merged in the order of their scores; what is in no piece becomes bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = hparams.file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        count = len(scores) if isinstance(scores, list) else 0
        raise hparams.error(
            "tokenizer.ggml.scores", f"expected {len(tokens)} scores, one per token, got {count}"
        )
    vocabulary = _vocabulary(tokens)
    usable = {t for t, kind in zip(tokens, kinds, strict=True) if kind in (NORMAL, USER_DEFINED)}
    ranked: list[tuple[float, int, str, str]] = []
    for i, token in enumerate(tokens):
        if token in usable:
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in usable and right in usable:
                    ranked.append((-scores[i], i, left, right))
    ranked.sort(key=lambda merge: merge[:2])
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    model = models.BPE(
        vocabulary,
        [merge[2:] for merge in ranked],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    leading = hparams.flag("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(SPACE)] if leading else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if leading else back)
    return tokenizer


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """Ids by text; the first where a text occurs twice."""
    return {token: len(tokens) - 1 - i for i, token in enumerate(reversed(tokens))}


def _strings(hparams: Hyperparameters, key: str) -> list[str]:
    if not hparams.has(key):
        raise hparams.error(key, "the key is missing", "use the tokenizer of the original model")
    value = hparams.file.metadata[key]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise hparams.error(key, "expected a list of texts")
    for i, item in enumerate(value):
        if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
            raise hparams.error(key, f"item {i} is not UTF-8: {shorten(item)}")
    return value


def _token_types(hparams: Hyperparameters, count: int) -> list[int]:
    key = "tokenizer.ggml.token_type"
    if not hparams.has(key):
        return [NORMAL] * count
    value = hparams.file.metadata[key]
    if not isinstance(value, list) or len(value) != count:
        got = len(value) if isinstance(value, list) else 0
        raise hparams.error(key, f"expected {count} types, one per token, got {got}")
    return value


def _named_tokens(hparams: Hyperparameters, tokens: Sequence[str]) -> dict[str, str]:
    """The tokens that have a name in transformers, such as eos_token."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "mask": "mask"}
    found = {}
    for theirs, ours in names.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        if hparams.has(key):
            i = hparams.integer(key, least=0)
            if i >= len(tokens):
                raise hparams.error(key, f"expected one of {len(tokens)} tokens, got {i}")
            found[f"{ours}_token"] = tokens[i]
    return found


def _add_special_tokens(
    tokenizer: Any,
    hparams: Hyperparameters,
    kind: str,
    tokens: list[str],
    kinds: list[int],
    named: set[str],
) -> None:
    """Tokens that are found in a text before anything else is done to it."""
    from tokenizers import AddedToken

    special, plain = [], []
    for token, its_kind in zip(tokens, kinds, strict=True):
        if its_kind == CONTROL or (token in named and its_kind != NORMAL):
            special.append(AddedToken(token, special=True, normalized=False))
        elif its_kind == USER_DEFINED:
            # A piece with the sign for a blank can only be found where blanks have become it.
            escaped = kind == "llama" and SPACE in token
            plain.append(AddedToken(token, special=False, normalized=escaped))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_template(tokenizer: Any, hparams: Hyperparameters, kind: str, tokens: list[str]) -> None:
    """The tokens put before and after every text."""
    from tokenizers import processors

    rule = hparams.text("tokenizer.ggml.pre", "default")
    begins = kind == "llama" or rule in LLAMA3
    wanted = {
        "bos": hparams.flag("tokenizer.ggml.add_bos_token", begins),
        "eos": hparams.flag("tokenizer.ggml.add_eos_token", False),
    }
    around: dict[str, tuple[str, int]] = {}
    for name, want in wanted.items():
        key = f"tokenizer.ggml.{name}_token_id"
        if want and hparams.has(key):
            i = hparams.integer(key, least=0)
            around[name] = (tokens[i], i)
    before = [around["bos"][0]] if "bos" in around else []
    after = [around["eos"][0]] if "eos" in around else []
    steps: list[Any] = []
    if kind == "gpt2":
        steps.append(processors.ByteLevel(trim_offsets=False))
    if around:
        steps.append(
            processors.TemplateProcessing(
                single=[*before, "$A", *after],
                pair=[*before, "$A", *after, *before, "$B:1", *after],
                special_tokens=list(dict.fromkeys(around.values())),
            )
        )
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
