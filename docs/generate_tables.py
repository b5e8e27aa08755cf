# SPDX-License-Identifier: MIT
"""The tables of the documents, written from the code of this tree (which must be built).

    python docs/generate_tables.py          rewrite every marked table
    python docs/generate_tables.py --check  change nothing; exit status 1 if one is out of date

A table stands between <!-- NAME --> and <!-- /NAME -->, each on a line of its own. Tables of
measurements come from benchmarks/results, with the machine that they were measured on.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree, whatever is installed

import torch  # noqa: E402

from quantgemm import _C, ops  # noqa: E402
from quantgemm.formats import FORMATS  # noqa: E402

# document -> tables that it must have; others are filled where their markers are
SPEED = ["dequantize", "quantize", "cpu_dequantize", "cpu_gemm", "gguf_open"]
PACKED = ["packed_pack", "packed_types", "packed_tokens", "packed_moe"]
PACKED += ["packed_chain", "packed_heatmap"]
LADDER = ["gemm_ladder", "gemm_types", "gemm_tokens"]
CACHES = ["kv_cache", "kv_packing", "sparse_kv_attention", "sparse_kv_compression"]
SAMPLING = ["sampling_modes", "sampling_peers", "sampling_grid"]
RESULTS = [*SPEED, *PACKED, *LADDER, *CACHES, *SAMPLING, "models", "speculation"]
DOCUMENTS: dict[Path, set[str]] = {
    ROOT / "docs" / "formats.md": {"formats-table"},
    ROOT / "docs" / "performance.md": {f"results-{name}" for name in SPEED + PACKED},
    ROOT / "docs" / "ladder.md": {f"results-{name}" for name in LADDER},
    ROOT / "docs" / "sampling.md": {f"results-{name}" for name in SAMPLING},
    ROOT / "docs" / "sparse-kv.md": {f"results-{name}" for name in CACHES},
    ROOT / "docs" / "models.md": {"results-models", "results-speculation"},
    ROOT / "README.md": {"formats-table"},
}
NUMBERS = ["id", "weights", "bytes", "bits/weight", "group"]
MARKS = ["offset", "quantize", "importance", "packed"]
YES, NO = "✓", "–"


def uses_importance(type_id: int) -> bool:
    """Whether `quantize` takes column weights for this type: asked of the op itself."""
    ones = torch.ones(FORMATS[type_id].block_elems)
    try:
        ops.quantize(ones, type_id, ones)
    except NotImplementedError:
        return False
    return True


def formats_table() -> str:
    """Every type in the order of the C++ registry."""
    rows = [["type", *NUMBERS, *MARKS], [":--", *["--:"] * len(NUMBERS), *[":-:"] * len(MARKS)]]
    for entry in _C.format_table():
        fmt, writable = FORMATS[entry["type_id"]], entry["can_quantize"]
        numbers = fmt.type_id, fmt.block_elems, fmt.block_bytes, f"{fmt.bits_per_weight:g}"
        group = NO if fmt.is_plain else fmt.group
        marks = (
            fmt.has_offset,
            writable,
            writable and uses_importance(fmt.type_id),
            entry["can_pack"],
        )
        rows.append([fmt.name, *map(str, (*numbers, group)), *(YES if m else NO for m in marks)])
    return markdown(rows)


def results_table(name: str) -> str:
    """What `--out benchmarks/results` of a benchmark left behind."""
    kept = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    columns = list(kept["rows"][0])
    rows = [columns, ["--:"] * len(columns)]
    for row in kept["rows"]:
        values = (row[column] for column in columns)
        rows.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in values])
    machine = ", ".join(f"{key} {value}" for key, value in kept["machine"].items())
    return f"{markdown(rows)}\n\nMeasured on: {machine}."


def markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


TABLES = {"formats-table": formats_table}
TABLES |= {f"results-{name}": partial(results_table, name) for name in RESULTS}


def with_tables(path: Path, required: set[str]) -> str:
    """The text of a document with its tables as they should be."""
    text = path.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        between = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
        found = len(between.findall(text))
        wanted = max(text.count(begin), text.count(end), int(name in required))
        if found != wanted:
            raise SystemExit(f"{path.relative_to(ROOT)}: no {begin.strip()} … {end.strip()}")
        if found:
            text = between.sub(table() + "\n", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether tables are stale")
    check: bool = parser.parse_args().check
    stale = []
    for path, required in DOCUMENTS.items():
        if not path.exists() and not required:
            continue
        text = with_tables(path, required)
        if text != path.read_text(encoding="utf-8"):
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale:
        said = "out of date, run docs/generate_tables.py" if check else "rewritten"
        print(f"tables: {', '.join(stale)}: {said}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
