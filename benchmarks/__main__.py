"""Benchmarks: python -m benchmarks run --suite NAME | table FILE.json | danet-aims FOLDER | picture FILE.json FILE.png

python -m benchmarks run --suite encoder                     on an accelerator, JSON in outputs/benchmarks/encoder.json
python -m benchmarks run --suite train --lengths 1024 16384 --only LEAP
python -m benchmarks run --suite leap-train --rounds 5       on a CPU (the options of benchmarks.cpu_speed)
python -m benchmarks table docs/data/h200-encoder.json
python -m benchmarks picture docs/data/h200-encoder.json docs/img/h200-encoder.png
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from . import cpu_speed
from .registry import SUITES, run_suite
from .report import danet_aims, picture, table
from .suites import SUITES as CPU_SUITES


def is_wanted(name: str, only: list[str], skip: list[str]) -> bool:
    """Whether a case of this name was asked for."""
    return any(word in name for word in only) and not any(word in name for word in skip)


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a suite")
    run.add_argument("--suite", required=True, choices=[*SUITES, *CPU_SUITES])
    run.add_argument("--lengths", type=int, nargs="+", default=[], help="tokens a row (default: the suite's own)")
    run.add_argument("--runs", type=int, default=5, help="timed runs of each case (default: 5)")
    run.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    run.add_argument("--skip", nargs="+", default=[], help="but none of these")
    run.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    run.add_argument("--add", action="store_true", help="keep the other cases that the JSON there holds already")
    show = commands.add_parser("table", help="print the JSON of a suite as Markdown")
    show.add_argument("json", type=Path)
    aims = commands.add_parser("danet-aims", help="print what DANet reaches on a CPU beside its aims")
    aims.add_argument("folder", type=Path, help="folder with cpu-danet-forward-*.json")
    draw = commands.add_parser("picture", help="draw speed and memory against length")
    draw.add_argument("json", type=Path)
    draw.add_argument("png", type=Path)
    arguments, rest = parser.parse_known_args()
    if arguments.command == "table":
        print(table(arguments.json))
    elif arguments.command == "danet-aims":
        print(danet_aims(arguments.folder))
    elif arguments.command == "picture":
        picture(arguments.json, arguments.png)
    elif arguments.suite in CPU_SUITES:
        lengths = ["--lengths", *map(str, arguments.lengths)] if arguments.lengths else []
        sys.argv = ["cpu_speed", arguments.suite, "--output", str(arguments.output), *lengths, *rest]
        cpu_speed.main()
        return
    else:
        wanted = partial(is_wanted, only=arguments.only, skip=arguments.skip)
        run_suite(arguments.suite, arguments.lengths, arguments.runs, wanted, arguments.output, arguments.add)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")


if __name__ == "__main__":
    main()
