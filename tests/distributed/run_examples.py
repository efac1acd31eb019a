"""Runs the training example several times, then heads.py, in one set of processes, whose start is what costs time.

run_examples.py RUNS.json          [[argument, ...], ...], one list a run; heads.json comes to lie beside it
"""

import json
import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed" / "train.py"

if __name__ == "__main__":
    runs = Path(sys.argv[1])
    for arguments in json.loads(runs.read_text()):
        sys.argv = [str(EXAMPLE), *arguments]
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    sys.argv = ["heads.py", str(runs.with_name("heads.json"))]
    runpy.run_path(str(Path(__file__).with_name("heads.py")), run_name="__main__")
