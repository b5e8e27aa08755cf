# SPDX-License-Identifier: MIT
"""quantgemm inside other people's libraries; each module says what it changes there, and undoes it.

    from quantgemm.integrations import transformers as gguf_in_transformers
    gguf_in_transformers.enable()       # from_pretrained(..., gguf_file=...) keeps weights packed

Nothing here is imported by `import quantgemm`, and none of the libraries is a requirement of it.
"""
