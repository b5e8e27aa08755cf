# SPDX-License-Identifier: MIT
"""One file per subcommand, each with `add_parser` and `run`, and what they share: `output` (tables,
numbers, errors), `devices` (--device), `files` (opening by content), `sources` (what `quantize`
reads) and `models` (loading a whole one)."""
