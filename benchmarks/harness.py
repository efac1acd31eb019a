"""Ours beside peers in one process, by PyTorch's timers: `triton.testing.do_bench` on a GPU, `torch.utils.benchmark` elsewhere.

A suite is a module with `about(suite)`, facts for the head of its JSON, and `cases(suite, lengths, quick)`; SUITES names it. On a
GPU every case is measured alone, memory included, and one whose check fails is refused. Cases that have a `job` take turns on a
CPU, so that a busy machine slows all alike, and are compared with the first of their job. The JSON is written after each case or
job, so that a run that is cut keeps what it has.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from .report import comparison
from .watch import Watch

SUITES = {  # name -> module in suites/; a new family adds its own
    **dict.fromkeys(("encoder", "encoder-train", "encoder-30m", "encoder-train-30m"), "gpu_encoder"),
    "train": "gpu_train",
    "decode": "gpu_decode",
    "sea": "gpu_sea",
    "causal": "gpu_causal",
    "loss": "gpu_loss",
    "float8": "gpu_float8",
    "card": "card",
    **dict.fromkeys(("leap-train", "leap-decode", "leap-contexts"), "leap"),
    **{
        f"danet-{what}-{size}{dtype}": "danet"
        for what in ("forward", "train")
        for size in ("30m", "330m")
        for dtype in ("", "-bfloat16")
    },
    "sea-memory": "sea_memory",
    **dict.fromkeys(
        ("sea-bert-forward", "sea-bert-train", "sea-llama-forward", "sea-llama-train", "sea-llama-decode"), "sea_models"
    ),
}
LONG_JOB = 90.0  # seconds after which no further round of a job begins
WARM_UPS = 3  # the first compiles, the second may record a CUDA graph
LONG_STEP_MS = 1000.0  # beside which neither a cold cache nor the launch of a step is anything
TURN = 0.5  # seconds of one contender's turn, at least


@dataclass
class Work:
    """What is timed: `step()` processes `tokens`. `facts` are reported with the figures; `count` steps are in one call.

    For the peak memory on a CPU: the calls that reach it, and what the whole would hold besides, in MiB.
    """

    step: Callable[[], Any]
    tokens: int
    facts: dict[str, Any] = field(default_factory=dict)
    count: int = 1
    runs_to_peak: int = 2
    absent_mb: float = 0.0


@dataclass
class Case:
    """One contender at one length.

    make: builds the `Work`. check: returns (error, allowed error) of what it computes, both relative to float64 or float32; None
    for a peer from a library. limit: thousand tokens a second that the matrix units allow, counting the operations it does.
    job: what this case is compared in. operations: for one token, where they can be counted.
    """

    name: str
    length: int
    make: Callable[[], Work]
    check: Callable[[], tuple[float, float]] | None = None
    limit: float | None = None
    job: str = ""
    operations: float | None = None


def layer_pass(attend: Callable[..., torch.Tensor], given: list[torch.Tensor], tokens: int, training: bool) -> Work:
    """`attend(*given)`, and its backward into `given` where `training`."""

    def step():
        with torch.set_grad_enabled(training):
            out = attend(*given)
            if training:
                for x in given:
                    x.grad = None
                out.float().square().mean().backward()

    return Work(step, tokens)


def device() -> str:
    """Where cases run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """Device and versions, without which no figure means anything."""
    found = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()}
    for name in ("hf-linear-attn", "triton", "transformers", "flash-linear-attention", "liger-kernel", "torchao"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {**found, "torch": torch.__version__, "python": platform.python_version(), "date": date}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


def free() -> None:
    """Give back what the case before held."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timer(step: Callable[[], Any], threads: int | None = None) -> Timer:
    """PyTorch's timer of a call: waits for the device, uses that many threads."""
    return Timer("step()", globals={"step": step}, num_threads=threads or torch.get_num_threads())


def milliseconds(step: Callable[[], Any], runs: int) -> list[float]:
    """Times of `runs` calls or more on the device, after calls that warm it up."""
    clock = timer(step)
    once = 1e3 * clock.timeit(1).mean
    if torch.cuda.is_available() and once < LONG_STEP_MS and _has_triton():
        from triton.testing import do_bench

        # Not its 100 ms: caches of peers grow with every step, or end.
        return do_bench(step, warmup=10, rep=max(25, (runs + 0.5) * once), return_mode="all")
    return [1e3 * seconds for seconds in clock.blocked_autorange(min_run_time=1e-3 * runs * once).times]


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def measure(case: Case, runs: int) -> dict[str, Any]:
    """The row of a case on its own; refuses (an "error" in the row) one whose check fails."""
    free()
    row: dict[str, Any] = {"length": case.length, "name": case.name}
    if case.limit is not None:
        row["limit_ktokens_per_s"] = round(case.limit, 1)
    try:
        if case.check is not None:
            error, allowed = case.check()
            row |= {"check_error": error, "check_allowed": allowed}
            if not error <= allowed:  # also refuses NaN
                return row | {"error": f"refused: error {error:.2e}, allowed {allowed:.2e}"}
            free()
        work = case.make()
        for _ in range(WARM_UPS):
            work.step()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            work.step()  # before `do_bench`, which holds memory of its own
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        with Watch() as watch:
            times = milliseconds(work.step, runs)
        speeds = [work.tokens / ms for ms in times]
        row |= {
            "ktokens_per_s": round(statistics.median(speeds), 2),
            "spread": [round(each, 2) for each in quartiles(speeds)],
            "ms": round(statistics.median(times) / work.count, 4),
            "runs": len(times),
            **work.facts,
            **watch.facts(),
        }
    except Exception as error:  # one contender that cannot do a length must not end the run
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return row


def measure_in_turns(job: list[Case], rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds per token of each case in each round: a, b, c, a, b, c, ... Each is a median over half a second, or of one call."""
    built = {case.name: case.make() for case in job}
    times: dict[str, list[float]] = {name: [] for name in built}
    started = time.perf_counter()
    while len(times[job[0].name]) < rounds:
        for name, work in built.items():
            # The calls that find out how many fit into a turn bring a small model back into the caches.
            times[name].append(timer(work.step, threads).blocked_autorange(min_run_time=TURN).median / work.tokens)
        if time.perf_counter() - started > LONG_JOB:
            break
    return times


def summarize(job: list[Case], times: dict[str, list[float]], memory: dict[str, float | None]) -> list[dict[str, Any]]:
    """Rows of the table. `speed_ratio` is the first's speed over the contender's, from each round's pair: median and quartiles.

    `operations_ratio` is what it would be if time were operations: theirs over ours.
    """
    rows = []
    for case in job:
        rates = [1 / s for s in times[case.name]]
        ratios = [theirs / ours for ours, theirs in zip(times[job[0].name], times[case.name], strict=True)]
        row = {"job": case.job, "contender": case.name, "tokens_per_second": statistics.median(rates)}
        row |= {"tokens_per_second_quartiles": quartiles(rates)}
        row |= {"speed_ratio": statistics.median(ratios), "speed_ratio_quartiles": quartiles(ratios)}
        row |= {"peak_memory_mb": memory.get(case.name), "rounds": len(rates)}
        if case.operations and job[0].operations:
            row |= {"operations_per_token": case.operations, "operations_ratio": case.operations / job[0].operations}
        rows.append(row)
    return rows


def quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile; the value itself where there is only one."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def memory_of(case: Case) -> float:
    """MiB by which building and running a case raises this process's peak resident memory. Call it in a fresh process."""
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work = case.make()
    for _ in range(work.runs_to_peak):
        work.step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit + work.absent_mb


def peak_memory(options: argparse.Namespace, number: int) -> float | None:
    """`memory_of` the case of this number in a process of its own; None where that fails or is unknown."""
    command = [sys.executable, "-m", "benchmarks", options.suite, "--memory-of", number, "--threads", options.threads]
    command += ["--lengths", *options.lengths] * bool(options.lengths) + ["--quick"] * options.quick
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    found = float(done.stdout.split()[-1])
    return None if math.isnan(found) else found


def run_suite(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a suite into `options.out`."""
    suite = importlib.import_module(f"benchmarks.suites.{SUITES[options.suite]}")
    cases = suite.cases(options.suite, options.lengths, options.quick)
    if options.memory_of is not None:
        torch.set_num_threads(options.threads)
        print(memory_of(cases[options.memory_of]))
        return {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    about = {"suite": options.suite, **machine(), **suite.about(options.suite)}
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    numbered = [(number, case) for number, case in enumerate(cases) if _is_wanted(case.name, options)]
    one_by_one = not any(case.job for case in cases)
    return (_alone if one_by_one else _in_turns)(numbered, options, about, known, getattr(suite, "measure", measure))


def _is_wanted(name: str, options: argparse.Namespace) -> bool:
    return any(word in name for word in options.only) and not any(word in name for word in options.skip)


def _alone(numbered, options, about: dict, known: dict, measure: Callable) -> dict[str, Any]:
    """Case after case; with `--add` the file's other cases stay."""
    result = {**about, "runs": options.rounds, "cases": known.get("cases", []) if options.add else []}
    for _, case in numbered:
        row = measure(case, options.rounds)
        others = [x for x in result["cases"] if (x["name"], x["length"]) != (case.name, case.length)]
        result["cases"] = [*others, row]
        print({key: value for key, value in row.items() if key != "spread"}, flush=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _in_turns(numbered, options, about: dict, known: dict, _) -> dict[str, Any]:
    """Job after job; with `--no-memory` the peak memory that the file has stays."""
    head = about | {"threads": options.threads, "load_before": os.getloadavg()[0]}
    result: dict[str, Any] = {"machine": head, "rows": [], "seconds_per_token": {}}
    memories = {(row["job"], row["contender"]): row["peak_memory_mb"] for row in known.get("rows", [])}
    for name in dict.fromkeys(case.job for _, case in numbered):
        job = {number: case for number, case in numbered if case.job == name}
        if options.no_memory:
            memory = {case.name: memories.get((name, case.name)) for case in job.values()}
        else:
            memory = {case.name: peak_memory(options, number) for number, case in job.items()}
        times = measure_in_turns(list(job.values()), options.rounds, options.threads)
        rows = summarize(list(job.values()), times, memory)
        print(f"\n{comparison(rows)}", flush=True)
        result["rows"] += rows
        result["seconds_per_token"][name] = times
        head |= {"load_after": os.getloadavg()[0]}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """|ours - exact| / |exact|."""
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()
