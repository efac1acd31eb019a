"""Comparable measurements: contenders run alternately in one process, so that a busy machine slows all of them alike."""

import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

LONG_ROUND, LONGEST_ROUND, LONG_RUN = 15.0, 90.0, 10.0  # seconds


class Contender(Protocol):
    """One way to do a job. `run` does it once; it may be called any number of times and does the same work each time."""

    tokens: int  # that one `run` processes

    def run(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """One row of a table: a job and everyone who does it. The first contender is ours; the others are compared with it.

    operations: of each contender for one token, where they can be counted.
    """

    name: str
    contenders: dict[str, Callable[[], Contender]]
    operations: dict[str, float] = field(default_factory=dict)


def time_alternately(job: Job, rounds: int, threads: int, min_seconds: float = 0.5) -> dict[str, list[float]]:
    """Seconds per token of each contender in each round: a, b, c, a, b, c, ... Short runs are repeated up to `min_seconds`.

    Where one run of all of them takes longer than LONG_ROUND seconds there are two rounds, and one above LONGEST_ROUND. The first
    run of a contender that takes longer than LONG_RUN then counts: what happens once, as filling caches, is nothing beside it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    built = {name: make() for name, make in job.contenders.items()}
    first = {name: _time(contender, 1) for name, contender in built.items()}
    times: dict[str, list[float]] = {name: [] for name in built}
    if sum(first.values()) > LONG_ROUND:
        rounds = 1 if sum(first.values()) < LONGEST_ROUND and rounds > 1 else 0
        for name, contender in built.items():
            times[name].append((first[name] if first[name] > LONG_RUN else _time(contender, 1)) / contender.tokens)
    repeats = {}
    for name, contender in built.items():
        short = first[name] <= min_seconds
        repeats[name] = max(1, min(50, round(min_seconds / _time(contender, 1)))) if short else 1
    for _ in range(rounds):
        for name, contender in built.items():
            if repeats[name] > 1:
                contender.run()  # brings a small model back into the caches; a long run would not notice
            times[name].append(_time(contender, repeats[name]) / contender.tokens)
    torch.set_num_threads(before)
    return times


def _time(contender: Contender, repeats: int) -> float:
    """Mean seconds of one `run` over `repeats` runs."""
    start = time.perf_counter()
    for _ in range(repeats):
        contender.run()
    return (time.perf_counter() - start) / repeats


def summarize(job: Job, times: dict[str, list[float]], memory: dict[str, float | None]) -> list[dict[str, Any]]:
    """Rows of the table. `speed_ratio` is our speed over the contender's, from each round's pair: median and quartiles.

    `operations_ratio` is what it would be if time were operations: theirs over ours.
    """
    ours = next(iter(times))
    rows = []
    for name, seconds in times.items():
        rates = [1 / s for s in seconds]
        ratios = [theirs / own for own, theirs in zip(times[ours], seconds, strict=True)]
        counted = {}
        if name in job.operations:
            counted = {
                "operations_per_token": job.operations[name],
                "operations_ratio": job.operations[name] / job.operations[ours],
            }
        rows.append(
            {
                "job": job.name,
                "contender": name,
                "tokens_per_second": statistics.median(rates),
                "tokens_per_second_quartiles": quartiles(rates),
                "speed_ratio": statistics.median(ratios),
                "speed_ratio_quartiles": quartiles(ratios),
                "peak_memory_mb": memory.get(name),
                "rounds": len(seconds),
                **counted,
            }
        )
    return rows


def quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile; the value itself where there is only one."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def peak_memory(command: list[str]) -> float | None:
    """Run a child process that prints the MiB by which a job raised its peak memory; None where that fails or is unknown."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    found = float(done.stdout.split()[-1])
    return None if math.isnan(found) else found


def memory_of(make: Callable[[], Contender]) -> float:
    """MiB by which building and running a contender raises this process's peak resident memory. Call it in a fresh process.

    A contender may say how many runs it takes to the peak (`runs_to_peak`), and what it would hold besides (`absent_mb`).
    """
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contender = make()
    for _ in range(getattr(contender, "runs_to_peak", 2)):
        contender.run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit + getattr(contender, "absent_mb", 0.0)


def machine(threads: int) -> dict[str, Any]:
    """Processor, threads and versions, without which no speed means anything."""
    names = ("transformers", "hf-linear-attn")
    found = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    return {
        "processor": _processor(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: found.get(name, "source tree") for name in names},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; the ratio is ours over theirs, above 1 where we are faster.

    Where operations were counted, the ratio stands beside what they alone would give, and divided by that.
    """
    counted = any("operations_ratio" in row for row in rows)
    heading = ["job", "model", "tokens per second (quartiles)", "ours / theirs (quartiles)"]
    heading += ["by operations", "reached of it"] * counted + ["peak memory"]
    lines = [heading]
    for row in rows:
        low, high = row["tokens_per_second_quartiles"]
        ratio_low, ratio_high = row["speed_ratio_quartiles"]
        line = [row["job"], row["contender"], f"{row['tokens_per_second']:,.0f} ({low:,.0f}-{high:,.0f})"]
        other = row["speed_ratio"] != 1
        line.append(f"{row['speed_ratio']:.2f} ({ratio_low:.2f}-{ratio_high:.2f})" if other else "")
        if counted:
            bound = row.get("operations_ratio")
            line += [f"{bound:.2f}", f"{row['speed_ratio'] / bound:.0%}"] if other and bound else ["", ""]
        line.append("-" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:,.0f} MiB")
        lines.append(line)
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---|---|" + "---:|" * (len(heading) - 2), *body])
