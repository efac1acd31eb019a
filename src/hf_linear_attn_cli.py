"""Where `hf-linear-attn` starts: outside of the package, because importing any part of that loads PyTorch."""

import os


def main() -> int:
    """Run the command line; returns its exit code."""
    # OpenMP reads this once, when PyTorch is loaded. Threads that wait then sleep instead of spinning: on cores that others
    # use, too, two spinning threads are several times slower than one; on idle cores the difference is small.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hf_linear_attn.cli.main import main as run

    return run()
