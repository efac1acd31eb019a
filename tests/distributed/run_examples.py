"""Runs the training example several times in one set of processes, whose start is what costs time.

run_examples.py RUNS.json          [[argument, ...], ...], one list a run
"""

import json
import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed" / "train.py"

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = [str(EXAMPLE), *arguments]
        runpy.run_path(str(EXAMPLE), run_name="__main__")
