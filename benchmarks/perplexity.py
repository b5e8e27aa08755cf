# SPDX-License-Identifier: MIT
"""What each type does to a model: perplexity and agreement of a GGUF model requantised to it.

    python benchmarks/perplexity.py MODEL.gguf [--types Q4_0,Q8_0] [--positions 2000]

Rows: the file as it is, then `quantgemm quantize --keep 'token_embd*' --keep 'output.*'` of it.
Text: the reference topics that come with Python, in windows of 512 tokens. "same" is how often the
most likely token is that of the file as it is. A type whose block does not divide a row leaves
those matrices as they were; "matrices" counts the others.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import platform
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

import quantgemm
from quantgemm import QuantLinear, cli
from quantgemm.commands.quantize import targets

TOPICS = ("assert", "class", "exceptions", "try", "with", "import", "function", "numbers")
WINDOW = 512


def read(model: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Perplexity over the ids, and the most likely next token at each."""
    loss, count, best = 0.0, 0, []
    for piece in ids.split(WINDOW):
        with torch.inference_mode():
            logits = model(piece[None]).logits[0].float()
        best.append(logits.argmax(-1))
        loss += float(torch.nn.functional.cross_entropy(logits[:-1], piece[1:], reduction="sum"))
        count += len(piece) - 1
    return math.exp(loss / count), torch.cat(best)


def twin(path: Path, device: str) -> Any:
    """The model as transformers loads it: every weight decoded to float32."""
    from transformers import AutoModelForCausalLM, utils

    utils.logging.disable_progress_bar()
    load = AutoModelForCausalLM.from_pretrained
    return load(path.parent, gguf_file=path.name, dtype=torch.float32).eval().to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--types", default=",".join(targets()))
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--twin", action="store_true", help="transformers' own decoded load too")
    args = parser.parse_args()

    tokenizer = quantgemm.load_tokenizer(args.model)
    text = "\n".join(topics[name] for name in TOPICS)
    ids = torch.tensor(tokenizer(text).input_ids[: args.positions], device=args.device)
    print(f"{Path(args.model).name}, {len(ids)} positions, float32, {args.device}")
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"quantgemm {quantgemm.__version__}, {torch.get_num_threads()} threads\n"
    )
    print("| type | MB | matrices | perplexity | same | seconds |")
    print("| :-- | --: | --: | --: | --: | --: |")
    want = None
    with tempfile.TemporaryDirectory() as folder:
        for name in ("as it is", *filter(None, args.types.split(","))):
            path = Path(args.model)
            if want is not None:
                path = Path(folder) / "model.gguf"
                keep = ["--keep", "token_embd*", "--keep", "output.*"]
                line = ["quantize", args.model, str(path), "--type", name, "--force", *keep]
                with contextlib.redirect_stdout(io.StringIO()):
                    status = cli.main(line)
                if status:
                    raise SystemExit(status)
            model = quantgemm.load_model(path, args.device, torch.float32, progress=False)
            layers = [m for n, m in model.named_modules() if isinstance(m, QuantLinear)]
            if want is None:
                changed = "–"
            elif name in ("F32", "F16", "BF16"):
                changed = "all"
            else:
                inner = [m for m in layers if m is not model.lm_head]
                changed = f"{sum(m.format.name == name for m in inner)} of {len(inner)}"
            start = time.perf_counter()
            perplexity, best = read(model, ids)
            seconds = time.perf_counter() - start
            want = best if want is None else want
            same = float((best == want).float().mean())
            size = path.stat().st_size / 1e6
            row = f"| {name} | {size:.1f} | {changed} | {perplexity:.3f} | {same:.1%} |"
            print(f"{row} {seconds:.1f} |", flush=True)
            del model, layers
            if args.twin and name == "as it is":
                start = time.perf_counter()
                perplexity, best = read(twin(path, args.device), ids)
                seconds = time.perf_counter() - start
                same = float((best == want).float().mean())
                row = f"| transformers' load | | all | {perplexity:.3f} | {same:.1%} |"
                print(f"{row} {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
