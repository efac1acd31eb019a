"""Where `hf-linear-attn` starts: outside of the package, which loads and extends Transformers as soon as it is imported."""

import os
import sys

# While this is set, importing the package does not register: a command does, when its words have been read and it begins to work.
reads_words_first = False


def main() -> int:
    """Run the command line; returns its exit code."""
    global reads_words_first
    # OpenMP reads this once, when PyTorch is loaded. Threads that wait then sleep instead of spinning: on cores that others
    # use, too, two spinning threads are several times slower than one; on idle cores the difference is small.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.modules.setdefault("hf_linear_attn_cli", sys.modules[__name__])  # where this file itself is what Python runs
    reads_words_first = True
    from hf_linear_attn.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
