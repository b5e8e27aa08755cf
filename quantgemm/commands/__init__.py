# SPDX-License-Identifier: MIT
"""One file per subcommand, each with `add_parser` and `run`, and what they share: `output` (tables,
numbers, errors), `devices` (--device), `files` (opening by content) and `sources` (what `quantize`
reads)."""
