"""What the card itself gives: products and copies in a short burst and under a long load, with clock and power beside them.

python -m benchmarks.card --output docs/data/h200-card.json
python -m benchmarks.card --table docs/data/h200-card.json

A product's speed depends on the clock, and the clock on the power that the product draws: the limit that a model can reach is
that of the clock under its own load.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .registry import machine, milliseconds
from .watch import Watch

BURST, LOAD_SECONDS, PAUSE_SECONDS = 3, 1.5, 0.5


def product(rows: int, inner: int, columns: int, batch: int = 1) -> tuple[Callable[[], Any], float]:
    """A product of random bfloat16 matrices, and its operations."""
    shape = (batch,) if batch > 1 else ()
    left = torch.randn(*shape, rows, inner, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(*shape, inner, columns, device="cuda", dtype=torch.bfloat16)
    out = left.new_empty(*shape, rows, columns)
    return (lambda: torch.matmul(left, right, out=out)), 2.0 * batch * rows * inner * columns


def weight_gradient(rows: int, inner: int, columns: int) -> tuple[Callable[[], Any], float]:
    """X^T Y for X (inner, rows) and Y (inner, columns), and its operations."""
    left = torch.randn(inner, rows, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(inner, columns, device="cuda", dtype=torch.bfloat16)
    return (lambda: left.mT @ right), 2.0 * rows * inner * columns


def copy(gib: int) -> tuple[Callable[[], Any], float]:
    """A copy, and the bytes that it reads and writes."""
    source = torch.randn(gib * 2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return (lambda: target.copy_(source)), 4.0 * source.numel()


LOADS = {
    "product 8,192 x 8,192 x 8,192": lambda: product(8192, 8192, 8192),
    "LEAP: up, 65,536 x 768 x 3,072": lambda: product(65536, 768, 3072),
    "LEAP: down, 65,536 x 3,072 x 768": lambda: product(65536, 3072, 768),
    "LEAP: weight gradient, 3,072 x 65,536 x 768": lambda: weight_gradient(3072, 65536, 768),
    "DANet: up, 65,536 x 1,024 x 4,096": lambda: product(65536, 1024, 4096),
    "DANet: down, 65,536 x 4,096 x 1,024": lambda: product(65536, 4096, 1024),
    "DANet: weight gradient, 4,096 x 65,536 x 1,024": lambda: weight_gradient(4096, 65536, 1024),
    "DANet: queries, 65,536 x 1,024 x 1,024": lambda: product(65536, 1024, 1024),
    "DANet: memory, 64 times 1,024 x 1,024 x 1,024": lambda: product(1024, 1024, 1024, 64),
    "copy of 2 GiB": lambda: copy(2),
}


def measure(name: str) -> dict[str, Any]:
    """Speed in a burst after a pause, and over a load of seconds, TFLOP/s or TB/s."""
    run, amount = LOADS[name]()
    torch.cuda.synchronize()
    run()
    torch.cuda.synchronize()
    time.sleep(PAUSE_SECONDS)

    def repeat(count):
        return milliseconds(lambda: [run() for _ in range(count)]) / count

    burst = repeat(BURST)
    count = int(LOAD_SECONDS * 1e3 / burst)
    repeat(count // 4)
    with Watch() as watch:
        load = repeat(count)
    return {
        "name": name,
        "unit": "TB/s" if name.startswith("copy") else "TFLOP/s",
        "burst": round(amount / burst / 1e9, 2),
        "load": round(amount / load / 1e9, 2),
        "ms": round(load, 4),
        **watch.facts(),
    }


def table(path: Path) -> str:
    """Markdown of what `main` wrote."""
    result = json.loads(path.read_text())
    lines = ["| | in a burst | under load | clock, MHz | power, W | held back by |", "|---|---:|---:|---:|---:|---|"]
    for row in result["loads"]:
        digits = 2 if row["unit"] == "TB/s" else 0
        lines.append(
            f"| {row['name']} | {row['burst']:.{digits}f} {row['unit']} | {row['load']:.{digits}f} {row['unit']} | "
            f"{row.get('sm_mhz', 0):,.0f} | {row.get('watts', 0)} | {row.get('held_back_by', '-')} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure all loads into a JSON file, or print one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/card.json"))
    parser.add_argument("--table", type=Path, help="print this JSON as Markdown instead")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    result: dict[str, Any] = {**machine(), "dtype": "bfloat16", "loads": []}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in LOADS:
        result["loads"].append(measure(name))
        print(result["loads"][-1], flush=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
