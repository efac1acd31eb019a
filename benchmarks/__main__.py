"""Benchmarks: python -m benchmarks SUITE [--out FILE.json]; table, compare, picture and danet-aims show what suites have written.

python -m benchmarks encoder --out encoder.json              on a GPU (default: outputs/benchmarks/<suite>.json)
python -m benchmarks train --lengths 1024 16384 --only LEAP
python -m benchmarks leap-train --rounds 5                   on a CPU, contenders taking turns
python -m benchmarks decode --quick                          tiny sizes on any machine: whether it runs, not how fast
python -m benchmarks table docs/data/h200-encoder.json
python -m benchmarks picture docs/data/h200-encoder.json docs/images/h200_encoder.png

python -m benchmarks compare --old old-1.json old-2.json --new new-1.json new-2.json

`PYTHONPATH=OTHER/src python -m benchmarks ...` measures the package of another checkout with these suites.
"""

import argparse
import os
from pathlib import Path

from . import report
from .harness import SUITES, run_suite


def main(words: list[str] | None = None) -> None:
    """Run one command."""
    options = arguments(words)
    if options.command == "table":
        print(report.table(options.json))
    elif options.command == "danet-aims":
        print(report.danet_aims(options.folder))
    elif options.command == "compare":
        print(report.compare(options.old, options.new))
    elif options.command == "picture":
        report.picture(options.json, options.png)
    else:
        run_suite(options)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUITE or command")
    show = commands.add_parser("table", help="print the JSON of a suite as Markdown")
    show.add_argument("json", type=Path)
    aims = commands.add_parser("danet-aims", help="print what DANet reaches on a CPU beside its aims")
    aims.add_argument("folder", type=Path, help="folder with cpu-danet-forward-*.json")
    both = commands.add_parser("compare", help="print the times of two checkouts on a GPU side by side")
    both.add_argument("--old", type=Path, nargs="+", required=True, help="JSON of a suite, one a run")
    both.add_argument("--new", type=Path, nargs="+", required=True, help="the same of the other checkout")
    draw = commands.add_parser("picture", help="draw speed and memory against length")
    draw.add_argument("json", type=Path)
    draw.add_argument("png", type=Path)
    for suite, module in SUITES.items():
        run = commands.add_parser(suite, help=f"measure benchmarks/suites/{module}.py")
        run.set_defaults(suite=suite)
        run.add_argument("--out", type=Path, default=Path(f"outputs/benchmarks/{suite}.json"))
        run.add_argument("--lengths", type=int, nargs="+", default=[], help="tokens a row (default: the suite's own)")
        run.add_argument("--rounds", type=int, default=5, help="timed calls of a case, or turns of a job (default: 5)")
        run.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
        run.add_argument("--skip", nargs="+", default=[], help="but none of these")
        run.add_argument("--quick", action="store_true", help="tiny sizes, to try the suite out")
        run.add_argument(
            "--add", action="store_true", help="on a GPU: keep the other cases that the JSON holds already"
        )
        run.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="on a CPU (default: 2)")
        run.add_argument("--no-memory", action="store_true", help="on a CPU: keep the peak memory that the JSON holds")
        run.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
