# SPDX-License-Identifier: MIT
"""Fuzzing of open_gguf and open_whisper_bin.

    python tests/fuzz_gguf.py --seconds 600 --jobs 2 --seed 1

Inputs are mutations of valid files (packed here, and those of ../shared where there are any) and
files put together from hostile pieces. For each of N bytes `check` demands: GGUFError or success
and nothing else; at most 64 MB + 4 N of memory; at most a second, or one per 10 MB; and after
success, that all metadata decodes, that every tensor's blocks have the right size and can be read,
and that what save_gguf makes of it opens as the same. Ends non-zero and keeps the input if not.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf_builder import ARR, SCALARS, STR, U16, U32, Builder, Packer, Whisper, every_value
from tqdm import tqdm

from quantgemm import GGUFError, GGUFFile, open_gguf, open_whisper_bin, save_gguf
from quantgemm.formats import FORMATS
from quantgemm.gguf import GGUFTensor, WhisperBin
from quantgemm.gguf.values import encode

SHARED = Path(__file__).resolve().parents[2] / "shared"
PARTS = 3
MEMORY = 64_000_000
ROUND_TRIP_EVERY = 8  # of the inputs that open
TOO_LONG = 30  # seconds after which an input counts as a hang

INTERESTING = [0, 1, 2, 4, 5, 7, 8, 9, 12, 13, 31, 32, 33, 63, 64, 127, 128, 255, 256, 65535, 65536]
INTERESTING += [2**k + d for k in (20, 30, 31, 32, 40, 53, 60, 61, 62, 63, 64) for d in (-1, 0, 1)]


class Failure(Exception):
    """A promise that an input broke."""


class Hang(BaseException):
    """Not an Exception, so that no handler in between can take it."""


# ------------------------------------------------------------------------------ what must hold


def check(path: Path, size: int, opener: Callable[[Path], Any], round_trip: bool) -> str:
    """Open `path`, of `size` bytes; returns 'opened' or 'refused', raises Failure."""
    before = peak_memory()
    start = time.process_time()
    file = attempt(opener, path)
    seconds = time.process_time() - start
    if seconds > max(1.0, size / 1e7):
        raise Failure(f"took {seconds:.2f} s for {size} bytes")
    tracemalloc.start(1)
    try:
        again = attempt(opener, path)
        peak = max(tracemalloc.get_traced_memory()[1], peak_memory() - before)
    finally:
        tracemalloc.stop()
    if peak > MEMORY + 4 * size:
        raise Failure(f"took {peak} bytes of memory for {size} bytes")
    if (file is None) != (again is None):
        raise Failure("opened once and not again")
    if file is None:
        return "refused"
    inspect(file, size)
    if round_trip and isinstance(file, GGUFFile):
        check_round_trip(file, path.with_name("round-trip.gguf"))
    return "opened"


def attempt(opener: Callable[[Path], Any], path: Path) -> Any:
    try:
        return opener(path)
    except GGUFError as error:
        if not str(error).startswith(str(path.parent)):
            raise Failure(f"error without its path: {error}") from error
        return None


def inspect(file: GGUFFile | WhisperBin, size: int) -> None:
    """Everything that was checked when opening can be read."""
    if isinstance(file, GGUFFile):
        for key in file.metadata:
            if "arr" in file.metadata.type_of(key):
                if len(file.metadata[key]) != file.metadata.len_of(key):
                    raise Failure(f"{key!r}: wrong length")
            elif file.metadata[key] is None:
                raise Failure(f"{key!r}: no value")
    else:
        if file.mel_filters.shape[0] != file.hparams["n_mels"]:
            raise Failure("mel filters of the wrong shape")
        if not all(isinstance(token, bytes) for token in file.vocab):
            raise Failure("tokens that are not bytes")
    for name, tensor in file.tensors.items():
        inspect_tensor(name, tensor, size)


def inspect_tensor(name: str, tensor: GGUFTensor, size: int) -> None:
    if (tensor.name, tensor.format) != (name, FORMATS[tensor.qtype]):
        raise Failure(f"{name!r}: wrong name or type")
    bits = math.prod(tensor.shape) * tensor.format.block_bytes / tensor.format.block_elems
    if tensor.nbytes != bits or (tensor.nbytes and tensor.offset + tensor.nbytes > size):
        raise Failure(f"{tensor!r} does not fit a file of {size} bytes")
    try:
        blocks = tensor.blocks
    except GGUFError:
        if tensor.byte_order == "big":
            return
        raise
    if blocks.nbytes != tensor.nbytes or blocks.shape[:-1] != tensor.shape[:-1]:
        raise Failure(f"{tensor!r} has blocks of shape {tuple(blocks.shape)}")
    blocks.sum()


def check_round_trip(file: GGUFFile, path: Path) -> None:
    tensors = {}
    for name, tensor in file.tensors.items():
        try:
            tensors[name] = (tensor.blocks, tensor.qtype) if tensor.shape else tensor
        except GGUFError:  # block types whose big-endian layout is not defined
            continue
    save_gguf(path, tensors, file.metadata)
    copy = open_gguf(path)
    for key in file.metadata:
        values = [encode(f.metadata.typed(key), "<") for f in (file, copy)]
        if values[0] != values[1]:
            raise Failure(f"{key!r} changed by saving")
    if list(copy.metadata) != list(file.metadata) or list(copy.tensors) != list(tensors):
        raise Failure("names changed by saving")
    for name, saved in copy.tensors.items():
        if not saved.blocks.equal(file.tensors[name].blocks) or saved.shape != (
            file.tensors[name].shape
        ):
            raise Failure(f"{name!r} changed by saving")


def reset_peak_memory() -> bool:
    """Let the peak start again from what is in use now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """The most memory this process had in use, in bytes: sees what tracemalloc does not."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------ inputs


def packed_tensors(version: int, endian: str) -> bytes:
    file = every_value(version, endian).key("general.alignment", U32, 64)
    file.alignment = 64
    for i, fmt in enumerate(FORMATS.values()):
        cols = 2 * fmt.block_elems
        data = random.Random(i).randbytes(2 * fmt.row_bytes(cols))
        file.tensor(f"blk.{i}.{fmt.name}", (cols, 2), fmt.type_id, data)
    return file.tensor("scalar", (), 0, bytes(4)).tensor("none", (32, 0, 1, 1), 2, b"").build()


def vocabulary() -> bytes:
    file = Builder()
    file.key("tokenizer.ggml.tokens", ARR, file.pack.array(STR, [f"t{i}" for i in range(300)]))
    file.key("tokenizer.ggml.token_type", ARR, file.pack.array(U16, list(range(300))))
    return file.tensor("w", (32, 4), 2, bytes(72)).build()


def part(no: int) -> bytes:
    file = Builder()
    file.key("split.no", U16, no).key("split.count", U16, PARTS)
    file.key("split.tensors.count", U32, PARTS)
    return file.tensor(f"w{no}", (4,), 0, bytes(16)).build()


def part_path(folder: Path, no: int) -> Path:
    return folder / f"part-{no + 1:05}-of-{PARTS:05}.gguf"


def whisper() -> bytes:
    file = Whisper(tokens=[b"token %d" % i for i in range(40)])
    file.record(b"encoder.bias", (5,), 0, bytes(20)).record(b"w", (64, 3), 2, bytes(108))
    return file.record(b"conv", (3, 4, 8), 1, bytes(192)).record(b"none", (0, 3), 0, b"").build()


def gguf_seeds() -> list[bytes]:
    layouts = [(version, endian) for version in (1, 2, 3) for endian in "<>"]
    seeds = [packed_tensors(*layout) for layout in layouts]
    seeds += [every_value(*layout).build() for layout in layouts]
    seeds += [vocabulary(), Builder().build()]
    for path in sorted([*SHARED.glob("gguf/*.gguf"), *SHARED.glob("gguf/bad/*.gguf")]):
        seeds.append(path.read_bytes()[:200_000])
    return seeds


def whisper_seeds() -> list[bytes]:
    files = sorted(SHARED.glob("whisper/*.bin"))
    return [whisper(), Whisper().build(), *(path.read_bytes()[:60_000] for path in files)]


def mutate(rng: random.Random, seed: bytes, others: list[bytes]) -> bytes:
    """A few random changes, most of them near the start, where the structure is."""
    data = bytearray(seed)
    for _ in range(min(rng.choice([1, 1, 1, 2, 3, 5, 8]), 1 + len(data))):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.7:
            at = int(at * rng.random() ** 3)
        kind = rng.randrange(9)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind in (2, 3, 4):
            width = rng.choice([2, 4, 8])
            value = rng.choice(INTERESTING) % (1 << 8 * width)
            data[at : at + width] = value.to_bytes(width, rng.choice(["little", "little", "big"]))
        elif kind == 5:
            del data[at : at + rng.choice([1, 4, 8, 16, rng.randrange(1, 200)])]
        elif kind == 6:
            source = rng.choice(others)
            start = rng.randrange(len(source) + 1)
            data[at:at] = source[start : start + rng.randrange(1, 200)]
        elif kind == 7:
            length = rng.randrange(1, 200)
            data[at:at] = data[at : at + length]
        else:
            del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


def number(rng: random.Random, usual: int, limit: int = 2**64) -> int:
    """Mostly the usual number, else one that may hurt."""
    return usual if rng.random() < 0.9 else rng.choice(INTERESTING) % limit


def hostile_gguf(rng: random.Random) -> bytes:
    """A file whose fields are valid or not each on its own, so that checks deep in it are met."""
    file = Builder(rng.choice([1, 2, 3, 3, 3]), rng.choice("<<<>"))
    file.alignment = rng.choice([8, 32, 32, 64])
    limit = 2**32 if file.version == 1 else 2**64
    if file.alignment != 32 or rng.random() < 0.3:
        file.key("general.alignment", U32, number(rng, file.alignment, 2**32))
    for i in range(rng.randrange(5)):
        file.keys.append(hostile_key(rng, file.pack, f"key.{number(rng, i)}"))
    offset = 0
    for i in range(rng.randrange(6)):
        fmt = rng.choice(list(FORMATS.values()))
        dims = [
            fmt.block_elems * rng.randrange(3),
            *(rng.randrange(4) for _ in range(rng.randrange(4))),
        ]
        size = math.prod(dims) // fmt.block_elems * fmt.block_bytes
        name = rng.choice([f"blk.{i}", f"blk.{i}", "x" * rng.randrange(70), "same", "é\0"])
        dims = [number(rng, dim, limit) for dim in dims]
        n_dims = number(rng, len(dims), 2**32)
        file.info(name, dims, number(rng, fmt.type_id, 2**32), number(rng, offset), n_dims)
        offset += -(-size // file.alignment) * file.alignment
    file.data = rng.randbytes(rng.choice([offset, offset, max(0, offset - 1), offset // 2]))
    file.n_keys = number(rng, len(file.keys), limit)
    file.n_tensors = number(rng, len(file.infos), limit)
    return file.build()


def hostile_key(rng: random.Random, pack: Packer, name: str) -> bytes:
    kind = rng.randrange(14)
    if kind in (STR, ARR, 13):
        limit = 2**32 if pack.version == 1 else 2**64
        if kind == STR:
            value = pack.string(rng.randbytes(5), number(rng, 5, limit))
        else:
            value = hostile_array(rng, pack, limit, rng.randrange(12))
    else:
        value = rng.randbytes(8)[: struct.calcsize("BbHhIif?  QqdB"[kind].replace(" ", "B"))]
    return pack.string(name) + pack.pack("I", kind) + value


def hostile_array(rng: random.Random, pack: Packer, limit: int, depth: int) -> bytes:
    if depth > 0 and rng.random() < 0.6:
        inner = [
            hostile_array(rng, pack, limit, depth - 1) for _ in range(rng.choice([0, 1, 1, 2]))
        ]
        return pack.array(ARR, inner, number(rng, len(inner), limit))
    _, kind, value, _ = rng.choice(SCALARS)
    items = [value] * rng.randrange(4)
    return pack.array(kind, items, number(rng, len(items), limit))


class Inputs:
    """An endless supply: `next` writes a file and says how to open it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.ggufs, self.whispers = gguf_seeds(), whisper_seeds()
        self.parts = [part(no) for no in range(PARTS)]
        self.original = True  # all parts in the folder are unchanged

    def next(self) -> tuple[str, Path, int, Callable[[Path], Any]]:
        """kind, path, bytes of all files it has, and the function that opens it"""
        rng = self.rng
        kind = rng.choices(["mutated", "hostile", "whisper", "part"], [50, 25, 15, 10])[0]
        path, opener = self.folder / "input.gguf", open_gguf
        if kind == "mutated":
            data = mutate(rng, rng.choice(self.ggufs), self.ggufs)
        elif kind == "hostile":
            data = hostile_gguf(rng)
            data = mutate(rng, data, self.ggufs) if rng.random() < 0.2 else data
        elif kind == "whisper":
            data = mutate(rng, rng.choice(self.whispers), self.whispers)
            path, opener = self.folder / "input.bin", open_whisper_bin  # type: ignore[assignment]
        else:
            changed, given = rng.randrange(PARTS), rng.randrange(PARTS)
            for no, original in enumerate(self.parts):
                part_path(self.folder, no).write_bytes(original)
            data = mutate(rng, self.parts[changed], self.ggufs)
            part_path(self.folder, changed).write_bytes(data)
            return kind, part_path(self.folder, given), len(data) + 1000, open_gguf
        path.write_bytes(data)
        return kind, path, len(data), opener


# ------------------------------------------------------------------------------ running


def on_alarm(signum: int, frame: object) -> None:
    raise Hang(f"no answer after {TOO_LONG} s")


@contextmanager
def alarm() -> Iterator[None]:
    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, TOO_LONG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(seconds: float, seed: int, keep: Path, limit: int | None = None) -> Counter[str]:
    """Run for `seconds`, or until `limit` inputs; counts of what happened, failures kept."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    reset_peak_memory()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        inputs = Inputs(Path(folder), seed)
        while time.monotonic() < end and counts.total() != limit:
            kind, path, size, opener = inputs.next()
            try:
                with alarm():
                    outcome = check(path, size, opener, inputs.rng.random() < 1 / ROUND_TRIP_EVERY)
            except (Exception, Hang) as error:
                outcome = "FAILED"
                save_failure(keep, Path(folder), f"{seed}-{counts.total()}", error)
            counts[f"{kind} {outcome}"] += 1
    return counts


def save_failure(keep: Path, folder: Path, name: str, error: BaseException) -> None:
    """Copy the input (with its sibling parts) and say what was wrong."""
    target = keep / name
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / "error.txt").write_text(f"{type(error).__name__}: {error}\n")
    print(f"{target}: {type(error).__name__}: {error}", file=sys.stderr)


def job(arguments: tuple[float, int, Path]) -> Counter[str]:
    return fuzz(*arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzz the GGUF and whisper readers")
    parser.add_argument("--seconds", type=float, default=600, help="how long (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seed", type=int, default=0, help="job j uses seed 1000 * SEED + j")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="for bad inputs")
    options = parser.parse_args()
    work = [(options.seconds, 1000 * options.seed + j, options.keep) for j in range(options.jobs)]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        result = pool.map_async(job, work)
        with tqdm(total=round(options.seconds), unit="s", disable=None) as bar:
            for _ in range(round(options.seconds)):
                result.wait(1)
                bar.update()
        counts = sum(result.get(), Counter())
    for name, count in sorted(counts.items()):
        print(f"{name:20} {count:12,}")
    failed = sum(count for name, count in counts.items() if name.endswith("FAILED"))
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{counts.total():,} inputs, {failed} failures, {cpu.ru_utime + cpu.ru_stime:.0f} CPU s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
