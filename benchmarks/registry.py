"""Cases on an accelerator: ours beside peers in one process, measured alone; a case that computes something wrong is refused.

A suite is a function `cases(lengths) -> list[Case]`; SUITES names them. `run_suite` measures case after case and writes the JSON
after each, so that a run that is cut keeps what it has. On a CPU everything runs, too (for tests); memory is then unknown.
"""

import gc
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .watch import Watch

SUITES = {
    "encoder": "gpu_encoder",
    "encoder-train": "gpu_encoder",
    "encoder-30m": "gpu_encoder",
    "encoder-train-30m": "gpu_encoder",
    "train": "gpu_train",
    "decode": "gpu_decode",
    "sea": "gpu_sea",
    "causal": "gpu_causal",
    "loss": "gpu_loss",
    "float8": "gpu_float8",
}
WARM_UPS = 3
LONG_STEP_MS = 2000.0  # steps of seconds need no third warm-up


@dataclass
class Work:
    """What is timed: `step()` processes `tokens`. `facts` are reported with the figures; `count` steps are in one call."""

    step: Callable[[], Any]
    tokens: int
    facts: dict[str, Any] = field(default_factory=dict)
    count: int = 1


@dataclass
class Case:
    """One contender at one length.

    make: builds the `Work`. check: returns (error, allowed error) of what it computes, both relative to float64 or float32; None
    for a peer from a library. limit: thousand tokens a second that the matrix units allow, counting the operations it does.
    """

    name: str
    length: int
    make: Callable[[], Work]
    check: Callable[[], tuple[float, float]] | None = None
    limit: float | None = None


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
    """Device and versions, without which no speed means anything."""
    found = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"}
    for name in ("torch", "triton", "transformers", "flash-linear-attention", "liger-kernel", "torchao"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {**found, "torch": torch.__version__, "python": platform.python_version(), "date": date}


def free() -> None:
    """Give back what the case before held."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def milliseconds(step: Callable[[], Any]) -> float:
    """Time of one call on the device."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure(case: Case, runs: int) -> dict[str, Any]:
    """The row of a case; refuses (an "error" in the row) one whose check fails."""
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
        for number in range(WARM_UPS):
            if milliseconds(work.step) > LONG_STEP_MS and number:  # the first call compiles
                break
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with Watch() as watch:
            times = sorted(milliseconds(work.step) for _ in range(runs))
        speeds = [work.tokens / ms for ms in times]
        row |= {
            "ktokens_per_s": round(statistics.median(speeds), 2),
            "spread": [round(min(speeds), 2), round(max(speeds), 2)],
            "ms": round(statistics.median(times) / work.count, 4),
            **work.facts,
            **watch.facts(),
        }
        if torch.cuda.is_available():
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    except Exception as error:  # one contender that cannot do a length must not end the run
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return row


def run_suite(
    name: str, lengths: list[int], runs: int, wanted: Callable[[str], bool], output: Path, add: bool = False
) -> dict[str, Any]:
    """Measure the cases of a suite whose name is wanted; writes output/<suite>.json after each.

    add: keep the cases that the file holds, but for those that are measured again.
    """
    suite = importlib.import_module(f"benchmarks.suites.{SUITES[name]}")
    path = output / f"{name}.json"
    result: dict[str, Any] = {"suite": name, **machine(), **suite.about(name), "runs": runs, "cases": []}
    print("\n".join(f"{key}: {value}" for key, value in result.items() if key != "cases"), flush=True)
    if add and path.exists():
        result["cases"] = json.loads(path.read_text())["cases"]
    output.mkdir(parents=True, exist_ok=True)
    for case in suite.cases(name, lengths):
        if not wanted(case.name):
            continue
        row = measure(case, runs)
        others = [x for x in result["cases"] if (x["name"], x["length"]) != (case.name, case.length)]
        result["cases"] = [*others, row]
        print({key: value for key, value in row.items() if key != "spread"}, flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """|ours - exact| / |exact|."""
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()
