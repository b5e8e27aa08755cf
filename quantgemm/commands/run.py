# SPDX-License-Identifier: MIT
"""`quantgemm run`: text from a model, as it comes, and what it cost."""

from __future__ import annotations

import argparse
import math
import secrets
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from quantgemm.commands.devices import choose_device
from quantgemm.commands.models import (
    add_model_arguments,
    load,
    peak_memory,
    synchronize,
    weight_bytes,
)
from quantgemm.commands.output import CommandError, plural, printable, shorten, size
from quantgemm.gguf import open_gguf
from quantgemm.kv.pages import FORMATS as KV_FORMATS
from quantgemm.models import Decoder, compile_decode, load_tokenizer, resolve_model_path
from quantgemm.sampling import (
    Model,
    NgramDraft,
    SamplingConfig,
    SpeculationStatistics,
    speculative_generate,
)

DESCRIPTION = """\
Continue a text, or answer it where the file has a chat template, with the weights as the file
quantises them. The text goes to standard output as it comes; speed and memory to standard error.

With --draft, a smaller model or the text itself ("ngram": what followed the last words before)
proposes tokens, and the model judges several in one pass. What comes out follows the same law,
and with --temperature 0 it is the same text, up to roundings.

On a GPU the steps are CUDA graphs. --kv keeps keys and values in 2 or 4 bits:
all of them (dense), the largest of each token (bitmap, --kv-sparsity) or 4 of each 8 (4of8);
KEYS/VALUES names one format for each.
"""
EPILOG = """\
examples:
  quantgemm run model.gguf -p "Why is the sky blue?"
  quantgemm run model.gguf -p "Once upon a time" --no-chat --temperature 0 --max-new-tokens 64
  quantgemm run large.gguf -p - --draft small.gguf < question.txt
  quantgemm run model.gguf -p - --kv dense4 < long.txt
  quantgemm run model.gguf -p - --kv bitmap2 --kv-sparsity 0.7 < long.txt
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help="generate text with a model",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "-p", "--prompt", required=True, metavar="TEXT", help="'-' reads standard input"
    )
    parser.add_argument(
        "-n", "--max-new-tokens", type=_count, default=256, metavar="N", help="default: 256"
    )
    parser.add_argument(
        "--temperature",
        type=_within(0, math.inf),
        default=0.8,
        metavar="T",
        help="0 takes the most likely token (default: 0.8)",
    )
    parser.add_argument(
        "--top-k", type=_count, default=40, metavar="K", help="0 is off (default: 40)"
    )
    parser.add_argument(
        "--top-p", type=_within(0, 1), default=0.95, metavar="P", help="1 is off (default: 0.95)"
    )
    parser.add_argument("--seed", type=_count, metavar="S", help="default: another each time")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="the prompt is a question (default: if the file has a chat template)",
    )
    parser.add_argument("--draft", metavar="DRAFT", help="'ngram', or a smaller model's GGUF file")
    parser.add_argument(
        "--num-drafts", type=_count, default=4, metavar="N", help="tokens at a time (default: 4)"
    )
    parser.add_argument(
        "--kv",
        type=_kv_formats,
        metavar="FORMAT",
        help=f"keys and values in this format: {', '.join(KV_FORMATS)}, or one for each of them as "
        "in dense4/bitmap2 (default: as they are); not with --draft",
    )
    parser.add_argument(
        "--kv-sparsity",
        type=_within(0, 0.99),
        metavar="S",
        help="of --kv bitmap2 and bitmap4: the part of each token that is dropped (default: 0.5)",
    )
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 31:
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text!r}")
    return int(text)


def _kv_formats(text: str) -> str:
    if not set(text.split("/", 1)) <= set(KV_FORMATS):
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(KV_FORMATS)}, or KEYS/VALUES, got {text!r}"
        )
    return text


def _within(low: float, high: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = float(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text}")
        return value

    convert.__name__ = "number"
    return convert


def run(args: argparse.Namespace) -> int:
    if args.kv and args.draft:
        raise CommandError("--kv: not with --draft, whose refused tokens it would have to forget")
    if args.kv_sparsity is not None and "bitmap" not in (args.kv or ""):
        raise CommandError("--kv-sparsity: only with --kv bitmap2 or --kv bitmap4")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    device, device_line = choose_device(args.device)
    print(device_line, file=sys.stderr)
    try:
        tokenizer = load_tokenizer(args.model)
    except ImportError as error:
        raise CommandError(str(error)) from error
    ids = encode(tokenizer, prompt, args.chat)
    start = time.perf_counter()
    model = load(args.model, device, args.dtype, args.algo)
    draft = None if args.draft is None else _draft(args.draft, device, args, model)
    smaller = smaller_vocabulary(model, draft)
    print(f"loaded in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    most = args.num_drafts + 1 if draft else 1  # tokens that a step reads
    room = model.config.max_position_embeddings - len(ids)
    if room <= 0:
        context = model.config.max_position_embeddings
        raise CommandError(f"--prompt: {len(ids)} tokens, expected fewer than {context}")
    seed = secrets.randbelow(1 << 20) if args.seed is None else args.seed
    config = SamplingConfig(args.temperature, args.top_k, args.top_p, seed=seed)
    count = min(args.max_new_tokens, room)
    decoder = _decoder(model, len(ids) + count, most, args.kv, args.kv_sparsity)
    if draft and not isinstance(draft, NgramDraft) and decoder is not None:
        draft = _decoder(draft, len(ids) + count, 1) or draft
    stream = TextStream(tokenizer)
    clock = Clock(device)

    def on_tokens(_: int, new: list[int]) -> None:
        clock.add(len(new))
        stream.add([token for token in new if token not in ends])

    ends = model.generation_config.eos_token_id or []
    text = torch.tensor(ids, device=device)
    statistics = None
    if decoder is not None and draft is None:
        decoder.generate(text, count, config, ends, on_tokens)
    else:
        result = speculative_generate(
            decoder or model,
            draft or NgramDraft(),
            text,
            count,
            args.num_drafts if draft else 0,
            config,
            ends,
            draft_to_target=smaller,
            on_tokens=on_tokens,
        )
        statistics = result.statistics if draft else None
    stream.end()
    _report(model, len(ids), clock, statistics, config)
    if decoder is not None:
        print(f"keys and values {size(decoder.kv_bytes)}", file=sys.stderr)
    return 0


def _decoder(
    model: Any, tokens: int, most: int, kv: str | None = None, sparsity: float | None = None
) -> Decoder | None:
    """Recorded steps of one and of `most` tokens, where the model can have them; said if not."""
    if kv is None and model.device.type != "cuda":
        return None
    try:
        options: dict[str, Any] = {} if sparsity is None else {"sparsity": sparsity}
        if kv is not None and "/" in kv:
            options["key_format"], options["value_format"] = kv.split("/", 1)
        decoder = compile_decode(model, tokens, kv and kv.split("/", 1)[0], **options)
        decoder.prepare(1)
        decoder.prepare(1, min(most, tokens))
        return decoder
    except (NotImplementedError, TypeError, ValueError, torch.OutOfMemoryError) as error:
        if kv is not None:
            raise CommandError(f"--kv: {error}") from error
        print(f"without CUDA graphs: {error}", file=sys.stderr)
        return None


def encode(tokenizer: Any, prompt: str, chat: bool | None) -> list[int]:
    """Ids of the prompt, as it is or as a question. chat: None decides by the template."""
    if chat and not tokenizer.chat_template:
        raise CommandError("--chat: the file has no chat template")
    if chat is False or not tokenizer.chat_template:
        ids = list(tokenizer(prompt).input_ids)
    else:
        question = [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(
                question, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # the template is a program of the file's
            raise CommandError(f"the file's chat template fails: {error}; try --no-chat") from error
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    if not ids:
        raise CommandError("--prompt: expected some text")
    return ids


def _draft(
    path: str, device: torch.device, args: argparse.Namespace, model: Any
) -> Model | NgramDraft:
    if path == "ngram":
        return NgramDraft()
    ours, its = _tokens(args.model), _tokens(path)
    if wrong := [i for i, (a, b) in enumerate(zip(ours, its, strict=False)) if a != b]:
        first = f"token {wrong[0]} is {its[wrong[0]]!r}, expected {ours[wrong[0]]!r}"
        raise CommandError(f"--draft: another vocabulary: {shorten(printable(first), 200)}")
    draft = load(path, device, args.dtype, args.algo)
    most, count = model.config.vocab_size, draft.config.vocab_size
    if count > most:
        raise CommandError(f"--draft: expected a vocabulary of at most {most} tokens, got {count}")
    if count < most:  # what its table lacks is read as another token: a bad guess at worst
        draft.get_input_embeddings().register_forward_pre_hook(
            lambda _, inputs: (inputs[0].clamp(max=count - 1),)
        )
    return draft  # type: ignore[no-any-return]


def _tokens(path: str) -> list[str]:
    return list(open_gguf(resolve_model_path(path)).metadata.get("tokenizer.ggml.tokens", ()))


def smaller_vocabulary(model: Any, draft: Any) -> torch.Tensor | None:
    """Ids of a draft whose table was padded to fewer rows, as happens within a family of models."""
    if draft is None or isinstance(draft, NgramDraft):
        return None
    count = draft.config.vocab_size
    if count == model.config.vocab_size:
        return None
    return torch.arange(count, device=model.device)


class TextStream:
    """Prints tokens as text, as soon as they are whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last ones: those before say whether a word has a space
        self._shown = 0  # of these

    def add(self, ids: list[int]) -> None:
        self._ids += ids
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):  # a character's bytes are still to come
            return
        before = len(self._decode(self._ids[: self._shown]))
        self._show(text[before:])
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown

    def end(self) -> None:
        before = len(self._decode(self._ids[: self._shown]))
        self._show(self._decode(self._ids)[before:])
        print(flush=True)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[no-any-return]

    def _show(self, text: str) -> None:
        print("".join(c if c in "\n\t" else printable(c) for c in text), end="", flush=True)


class Clock:
    """When the first and the last tokens came."""

    def __init__(self, device: torch.device) -> None:
        synchronize(device)
        self.start = self.last = time.perf_counter()
        self.first_count = self.count = 0
        self.first = 0.0

    def add(self, count: int) -> None:
        self.last = time.perf_counter()
        if not self.count:
            self.first, self.first_count = self.last - self.start, count
        self.count += count

    @property
    def per_second(self) -> float:
        """Of the tokens after the first step."""
        seconds = self.last - self.start - self.first
        return (self.count - self.first_count) / seconds if seconds > 0 else 0.0


def _report(
    model: Any,
    prompt: int,
    clock: Clock,
    statistics: SpeculationStatistics | None,
    config: SamplingConfig,
) -> None:
    lines = [
        f"{plural(prompt, 'token')} in, {plural(clock.count, 'token')} out, seed {config.seed}",
        f"first token after {clock.first:.2f} s, then {clock.per_second:.1f} tokens/s",
    ]
    if statistics is not None:
        rates = " ".join(f"{rate:.0%}" for rate in statistics.acceptance_per_position)
        lines.append(f"{statistics.tokens_per_step:.2f} tokens per step, drafts accepted: {rates}")
    host, device = peak_memory(model.device)
    memory = f"weights {size(weight_bytes(model))}"
    memory += f", peak on the device {size(device)}" if device is not None else ""
    memory += f", peak of the process {size(host)}" if host is not None else ""
    print("\n".join([*lines, memory]), file=sys.stderr)
