"""`python -m hf_linear_attn` is the `hf-linear-attn` command."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
