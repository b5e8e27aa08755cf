# SPDX-License-Identifier: MIT
"""`quantgemm transcribe`: speech in sound files as text."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time

import torch

from quantgemm.commands.devices import HELP as DEVICE_HELP
from quantgemm.commands.devices import choose_device, device_argument
from quantgemm.commands.output import CommandError, printable, size
from quantgemm.models.audio import SAMPLE_RATE, AudioError, read_audio
from quantgemm.models.whisper import import_transformers, load_whisper, transcribe
from quantgemm.models.whisper import whisper_processor as load_processor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

DESCRIPTION = """\
Print what is said in sound files, chunk by chunk of at most 30 s, cut where it is quiet.

FILE is a Whisper GGUF (`quantgemm quantize` makes them) or a legacy whisper.cpp .bin. AUDIO is WAV
of any sample rate, width and number of channels; FLAC, MP3 and the like are read where the package
soundfile is installed. Text goes to standard output, one line a chunk; device, time and memory to
standard error. The real-time factor is seconds of work per second of sound: below 1 it keeps up.
"""
EPILOG = """\
Needs transformers: pip install 'transformers>=5.17'

examples:
  quantgemm transcribe talk.wav --model tiny.en-q5_0.gguf
  quantgemm transcribe a.wav b.flac --model ggml-small-q5_1.bin --language de --translate
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "transcribe",
        help="speech as text, with a quantized Whisper",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("audio", metavar="AUDIO", nargs="+", help="sound files")
    parser.add_argument("--model", metavar="FILE", required=True, help="Whisper GGUF or .bin")
    parser.add_argument("--device", type=device_argument, help=DEVICE_HELP)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of activations (default: float32 on the CPU, else float16)"
    )
    parser.add_argument("--language", help="such as en (default: found out chunk by chunk)")
    parser.add_argument("--translate", action="store_true", help="into English")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        transformers = import_transformers("transcribe")
    except ImportError as error:
        raise CommandError(str(error)) from None
    transformers.logging.set_verbosity_error()  # it warns about how it calls itself
    device, device_line = choose_device(args.device)
    _say(device_line)
    start = time.perf_counter()
    processor = load_processor(args.model)
    model = load_whisper(args.model, device, DTYPES.get(args.dtype))
    weights = sum(p.nbytes for p in model.parameters())
    loaded = f"weights {size(weights)}, {str(model.dtype).removeprefix('torch.')} activations"
    _say(f"{args.model}: {loaded}, loaded in {time.perf_counter() - start:.1f} s")
    task = "translate" if args.translate else "transcribe"
    for path in args.audio:
        try:
            pcm = read_audio(path)
        except AudioError as error:
            raise CommandError(str(error)) from None
        start = time.perf_counter()
        try:
            for text in transcribe(model, processor, pcm, args.language, task):
                print(printable(text), flush=True)
        except ValueError as error:
            raise CommandError(f"{path}: {error}") from None
        _report(path, len(pcm) / SAMPLE_RATE, time.perf_counter() - start, device)
    return 0


def _report(path: str, sound: float, work: float, device: torch.device) -> None:
    line = f"{path}: {sound:.1f} s of sound in {work:.1f} s"
    if sound:
        line += f", real-time factor {work / sound:.3f}"
    _say(f"{line}, {_peak_memory(device)}")


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"peak of the GPU {size(torch.cuda.max_memory_allocated(device))}"
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        # Kilobytes, but bytes on macOS; the whole process, torch and transformers included.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return f"peak of the process {size(peak)}"
    return f"{os.cpu_count()} processors"


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
