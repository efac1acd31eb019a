"""Peak memory and time of one SEA layer on a CPU: a forward pass of 32k tokens, a training step of 16k with a teacher.

    python -m benchmarks.sea_memory --json docs/data/sea-memory.json

Each case runs in a process of its own, whose peak is what the operating system saw, weights and inputs included. 12 heads of 64,
k = 64, M = 128, float32, chunked form, one thread; the attention losses look at 64 sampled rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from hf_linear_attn.modeling.sea_attention import SeaAttentionCore, SeaOptions
from hf_linear_attn.modeling.sea_losses import TeacherTargets

HEADS, HEAD_DIM = 12, 64
CASES = [(causal, step, tokens) for step, tokens in ((False, 32768), (True, 16384)) for causal in (True, False)]


def measure(causal: bool, step: bool, tokens: int) -> dict:
    """Run one case here."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = SeaOptions(HEADS, HEAD_DIM, causal, k=64, predictor_length=128, max_positions=tokens, backend="chunked")
    core = SeaAttentionCore(options)
    q, k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM, requires_grad=step) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    if step:
        context = torch.randn(1, tokens, HEADS * HEAD_DIM)
        teacher = TeacherTargets(context=context, q=q.detach(), k=k.detach(), scaling=HEAD_DIM**-0.5)
        rows = torch.randperm(tokens)[:64].sort().values
        core(q, k, v, teacher=teacher, scaling=HEAD_DIM**-0.5, loss_rows=rows).loss.backward()
    else:
        with torch.no_grad():
            core(q, k, v, scaling=HEAD_DIM**-0.5)
    return {
        "causal": causal,
        "step": step,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "before_gib": round(before, 2),
    }


def line(case: dict) -> str:
    """A row of the table."""
    what = f"{'training step' if case['step'] else 'forward'}, {'causal' if case['causal'] else 'bidirectional'}"
    rows = ", attention losses on 64 sampled rows" if case["step"] else ""
    return f"| {what}, {case['tokens']:,} tokens{rows} | {case['peak_gib']:.2f} GiB | {case['seconds']:.0f} s |"


def main() -> None:
    """Run every case, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("outputs/sea-memory.json"))
    parser.add_argument("--case", type=int, help="run this one alone and print its JSON")
    parser.add_argument("--divide", type=int, default=1, help="lengths divided by this, to try it out")
    parser.add_argument("--table", type=Path, help="measure nothing, print what this file holds")
    options = parser.parse_args()
    if options.table is not None:
        print(
            "\n".join(
                ["| | peak | time |", "|---|---:|---:|", *map(line, json.loads(options.table.read_text())["cases"])]
            )
        )
        return
    if options.case is not None:
        causal, step, tokens = CASES[options.case]
        print(json.dumps(measure(causal, step, tokens // options.divide)))
        return
    found = []
    for case in range(len(CASES)):
        command = [sys.executable, "-m", "benchmarks.sea_memory", "--case", str(case), "--divide", str(options.divide)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"torch": torch.__version__, "cases": found}, indent=1) + "\n")
        print(line(found[-1]), flush=True)


if __name__ == "__main__":
    main()
