"""Where `hf-linear-attn` starts: outside of the package, because importing any part of that loads PyTorch."""

import os
import sys


def main() -> int:
    """Run the command line; returns its exit code."""
    # OpenMP reads this once, when PyTorch is loaded. Threads that wait then sleep instead of spinning: on cores that others
    # use, too, two spinning threads are several times slower than one; on idle cores the difference is small.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from hf_linear_attn.cli.main import main as run
    except ImportError as error:  # such as a Transformers that is too old
        print(f"hf-linear-attn: error: {error}", file=sys.stderr)
        return 1
    return run()
