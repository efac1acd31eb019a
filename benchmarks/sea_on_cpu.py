"""A whole SEA model beside the BERT that it is made of, on a CPU: does it pay, and from which length on?

    python -m benchmarks.sea_on_cpu --json docs/data/sea-on-cpu.json      measures (about three minutes on one quiet core)
    python -m benchmarks.sea_on_cpu --table docs/data/sea-on-cpu.json     prints the table

BERT has MiniLM's shape (6 layers, width 384, 12 heads) with positions for the longest text and random weights: the time of a
forward pass does not depend on them. One row, one thread, float32, both models in turn; the median of the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertModel

import hf_linear_attn
from hf_linear_attn.conversion import linearize

LENGTHS = (256, 512, 1024, 2048, 4096)
SIZES = {
    "SEA, k = 13, M = 64": {"k": 13, "predictor_length": 64},
    "SEA, k = 64, M = 128": {"k": 64, "predictor_length": 128},
}
HOST = "BERT (SDPA)"


def measured(lengths: tuple[int, ...], rounds: int) -> dict:
    """Seconds of a forward pass of each model at each length, and where."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    host = BertModel(BertConfig(max_position_embeddings=max(lengths), **shape)).eval()
    models = {HOST: host} | {name: linearize(host, "sea", **size).eval() for name, size in SIZES.items()}
    cases = []
    with torch.inference_mode():
        for length in lengths:
            ids = torch.randint(1000, (1, length))
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for count in range(rounds + 1):  # the first round is not counted
                for name, model in models.items():
                    started = time.perf_counter()
                    model(ids)
                    if count:
                        seconds[name].append(time.perf_counter() - started)
            for name, found in seconds.items():
                cases.append({"name": name, "length": length, "ms": 1000 * statistics.median(found), "rounds": rounds})
                print(f"{length:>6} {name:<24} {cases[-1]['ms']:>9,.0f} ms", flush=True)
    machine = {
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf-linear-attn": hf_linear_attn.__version__,
        "load after": round(os.getloadavg()[0], 1),
        "finished": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return {"machine": machine, "cases": cases}


def table(found: dict) -> str:
    """Milliseconds, and how many times as long as the host's."""
    lengths = sorted({case["length"] for case in found["cases"]})
    ms = {(case["name"], case["length"]): case["ms"] for case in found["cases"]}
    lines = [", ".join(f"{name} {value}" for name, value in found["machine"].items()), ""]
    lines += ["| ms | " + " | ".join(f"{n:,}" for n in lengths) + " |", "|---|" + "---:|" * len(lengths)]
    for name in dict.fromkeys(case["name"] for case in found["cases"]):
        cells = []
        for n in lengths:
            times = "" if name == HOST else f" ({ms[name, n] / ms[HOST, n]:.1f} times)"
            cells.append(f"{ms[name, n]:,.0f}{times}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="measure, and write here")
    parser.add_argument("--table", type=Path, help="print the table of this file")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens a row")
    parser.add_argument("--rounds", type=int, default=3, help="counted forward passes a model and length")
    options = parser.parse_args()
    if options.json:
        torch.set_num_threads(1)
        options.json.write_text(json.dumps(measured(tuple(options.lengths), options.rounds), indent=1) + "\n")
    if options.table or options.json:
        print(table(json.loads((options.table or options.json).read_text())))


if __name__ == "__main__":
    main()
