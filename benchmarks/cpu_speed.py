"""Speed and memory on a CPU, contenders alternating in one process.

    python -m benchmarks.cpu_speed                          every suite (about ten minutes on two idle cores)
    python -m benchmarks.cpu_speed leap-train --lengths 512 2048 --rounds 5
    python -m benchmarks.cpu_speed danet-forward --sizes 30m 330m --rounds 3 --output docs/data
    python -m benchmarks table docs/data/cpu-danet-forward-30m.json

Prints a Markdown table and writes it, with every round's time, to the output folder. Peak memory is measured for each contender
in a process of its own: how far building the model and two runs raise the process's peak.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from .measure import machine, markdown, memory_of, peak_memory, summarize, time_alternately
from .suites import SIZES, SUITES, Settings


def main() -> None:
    """Run the suites that were asked for."""
    options = arguments()
    torch.set_num_threads(options.threads)
    for size in options.sizes or [None]:
        measure_suites(size, options)


def measure_suites(size: str | None, options: argparse.Namespace) -> None:
    """All suites that were asked for, at one size (a name, or None for the one made of the options)."""
    own = Settings(options.hidden_size, options.num_layers, options.num_heads, options.vocab_size)
    settings = replace(SIZES[size] if size else own, lengths=tuple(options.lengths), dtype=options.dtype)
    if options.memory_of:
        suite, job, contender = options.memory_of
        print(memory_of(SUITES[suite](settings)[int(job)].contenders[contender]))
        return
    about = machine(options.threads) | {
        "dtype": options.dtype,
        "load_before": os.getloadavg()[0],
        "settings": vars(settings),
    }
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    for name in options.suites or SUITES:
        rows, rounds = [], {}
        kind = [] if options.dtype == "float32" else [options.dtype]
        stem = "-".join(["cpu", name, *([size] if size else []), *kind])
        known = known_memory(Path(options.output) / f"{stem}.json") if options.keep_memory else {}
        for number, job in enumerate(SUITES[name](settings)):
            memory = known.get(job.name, {})
            if not memory and not options.no_memory:
                memory = _memory(name, number, list(job.contenders), options, size)
            times = time_alternately(job, options.rounds, options.threads)
            rounds[job.name] = times
            rows += summarize(job, times, memory)
            print(f"\n{markdown(rows[-len(times) :])}", flush=True)
            # After every job, so that a run that is cut leaves what it measured.
            write(stem, rows, rounds, about, Path(options.output))


def _memory(suite: str, job: int, contenders: list[str], options: argparse.Namespace, size: str | None) -> dict:
    """Peak memory of each contender of a job: name -> MiB or None."""
    sizes = ["--dtype", options.dtype, *(["--sizes", size] if size else [])]
    for key in ("hidden_size", "num_layers", "num_heads", "vocab_size", "threads"):
        sizes += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    lengths = ["--lengths", *map(str, options.lengths)] if options.lengths else []
    found = {}
    for name in contenders:
        found[name] = peak_memory(
            ["-m", "benchmarks.cpu_speed", *sizes, *lengths, "--memory-of", suite, str(job), name]
        )
    return found


def known_memory(file: Path) -> dict[str, dict[str, float]]:
    """Job -> contender -> peak memory as an earlier run wrote it; jobs of which every contender's is known."""
    jobs: dict[str, dict[str, float]] = {}
    for row in json.loads(file.read_text())["rows"] if file.exists() else []:
        jobs.setdefault(row["job"], {})[row["contender"]] = row["peak_memory_mb"]
    return {job: found for job, found in jobs.items() if None not in found.values()}


def write(name: str, rows: list[dict], rounds: dict, about: dict, folder: Path) -> None:
    """<name>.json with everything, for `python -m benchmarks table`."""
    folder.mkdir(parents=True, exist_ok=True)
    about = about | {"load_after": os.getloadavg()[0], "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    result = {"machine": about, "rows": rows, "seconds_per_token": rounds}
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"out of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="tokens (default: the suite's own)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of alternating measurements (default: 7)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default: 2)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="sizes with a name, instead of the four that follow")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the suites of DANet")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument(
        "--keep-memory", action="store_true", help="take the peak memory that the output folder's JSON has"
    )
    parser.add_argument(
        "--output", default="outputs/benchmarks", help="folder for tables (default: outputs/benchmarks)"
    )
    parser.add_argument("--memory-of", nargs=3, metavar=("SUITE", "JOB", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.suites:
        if name not in SUITES:
            parser.error(f"unknown suite {name!r}: choose from {', '.join(SUITES)}")
    return options


if __name__ == "__main__":
    main()
