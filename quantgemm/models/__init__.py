# SPDX-License-Identifier: MIT
"""Files into models that run. Needs transformers, an optional extra: it is imported when used."""
