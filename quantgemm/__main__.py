# SPDX-License-Identifier: MIT
"""`python -m quantgemm`: the command line; see `quantgemm.cli`."""

import sys

from quantgemm.cli import main

sys.exit(main())
