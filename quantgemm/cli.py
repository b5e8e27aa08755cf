# SPDX-License-Identifier: MIT
"""The command line: `quantgemm env | ls | verify | quantize | run | bench | transcribe`.

`python -m quantgemm` is the same. A failure is one line on standard error and exit status 1, a
mistake in the arguments status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

import torch

from quantgemm import __version__
from quantgemm.commands import bench, env, ls, quantize, run, transcribe, verify
from quantgemm.commands.output import CommandError, one_line
from quantgemm.gguf import GGUFError

EPILOG = """\
examples:
  quantgemm env
  quantgemm ls model.gguf
  quantgemm verify model.gguf --type Q4_0
  quantgemm quantize model.safetensors model-q4_k.gguf --type Q4_K
  quantgemm run model.gguf -p "What is a block?"
  quantgemm bench model.gguf
  quantgemm transcribe talk.wav --model whisper-q5_0.gguf

exit status: 0; 1 after a failure, with one line on standard error; 2 for wrong arguments.
`quantgemm COMMAND --help` has the details of a command.
"""
INTERRUPTED = 130  # what shells report after Ctrl-C


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantgemm",
        description="GGUF-quantized weights: look into files, check decoding, quantize, use.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"quantgemm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (env, ls, verify, quantize, run, bench, transcribe):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit status."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version or a usage error, which argparse has printed
        return int(stop.code or 0)
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no failure
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        problem, status = "interrupted", INTERRUPTED
    except (CommandError, GGUFError) as error:
        problem, status = str(error), 1
    except OSError as error:
        problem, status = _system_problem(error), 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        problem, status = f"out of memory: {_first_sentences(error)}", 1
    print(f"quantgemm {args.command}: error: {one_line(problem)}", file=sys.stderr)
    return status


def _system_problem(error: OSError) -> str:
    """'model.gguf: no such file or directory'"""
    what = (error.strerror or str(error)).lower()
    return what if error.filename is None else f"{os.fsdecode(error.filename)}: {what}"


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a class for it, but for pinned memory and contexts it is only in the text."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def _first_sentences(error: Exception, limit: int = 200) -> str:
    lines = str(error).strip().splitlines() or ["the system has none left"]
    text = lines[0]
    return text if len(text) <= limit else text[: limit - 3] + "..."
