"""`hf-linear-attn demo`: LEAP and causal DANet learn real English beside GPT-2 of the same size; LEAP comes back from disk
and writes a paragraph.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..training.number_range import COUNT, SEED, THREADS
from ..training.options import OPTIONS_FILE, path
from ..training.text_data import EXCERPT_FOLDER
from .parser import Parser
from .quiet import begin_work
from .result import show, words_aside

DESCRIPTION = """\
The LEAP that comes with the package writes; then a small LEAP, a causal DANet and a GPT-2 of the same size learn the State of
the Union speeches from the same batches, each with its result; then their curves, speed, memory and held-out perplexity side by
side, and the new LEAP, loaded from disk, writes. Under four minutes on two quiet cores; --full trains longer (about ten).
"""

EXAMPLES = """\
examples:
  hf-linear-attn demo
  hf-linear-attn demo --full                                  what the figures in the documentation are from
  hf-linear-attn demo --steps 100 --output outputs/quick      a shorter one
Every step prints the `hf-linear-attn train` or `generate` command that does the same.
"""

COMPARISON = "comparison.json"
PROMPT = "The people of the United States"
# All models: the same size, text, batches, schedule and seed. Only the family differs.
SHARED = {
    "hidden-size": 128,
    "num-hidden-layers": 4,
    "num-attention-heads": 2,
    "vocab-size": 4096,
    "block-length": 512,
    "batch-size": 2,
    "learning-rate": 3e-3,
    "eval-tokens": 10_000,
    "log-every": 50,
    "final-eval-tokens": 25_000,
}
STEPS = 140
FULL = {"eval-tokens": 30_000, "final-eval-tokens": 100_000, "steps": 560}
TINY = {
    "hidden-size": 32,
    "num-hidden-layers": 2,
    "num-attention-heads": 1,
    "vocab-size": 512,
    "eval-tokens": 2048,
    "final-eval-tokens": 2048,
    "data": EXCERPT_FOLDER,
}
TITLES = {
    "leap": "LEAP, windows global, 4, 8, 16, learns",
    "danet": "DANet, causal, of the same size, learns from the same batches",
    "gpt2": "GPT-2 of the same size, learns from the same batches",
}
STAGES = len(TITLES) + 3
# A DANet block has 10 d^2 weights where the others have 12 d^2: one layer more gives the same number of parameters.
EXTRA_LAYERS = {"danet": 1}
EXTRA_WORDS = {"danet": ["--causal"]}
COLUMNS = {
    "label": "model",
    "parameters": "parameters",
    "tokens_per_second": "tokens/s",
    "memory": "peak memory",
    "validation": "validation ppl",
    "perplexity": "test ppl",
    "bits": "bits/byte",
    "seconds": "training",
}


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="hf-linear-attn demo", description=DESCRIPTION, epilog=EXAMPLES)
    made.add_number("--steps", int, COUNT, f"optimizer steps of each model (default: {STEPS}; --full: {FULL['steps']})")
    made.add_argument(
        "--output",
        type=path,
        default="outputs/demo",
        metavar="FOLDER",
        help="folder of the results (default: outputs/demo)",
    )
    made.add_number("--threads", int, THREADS, "CPU threads (default: all cores, at most 8)")
    made.add_number("--seed", int, SEED, "seed of weights and batches (default: 0)", 0)
    made.add_argument("--full", action="store_true", help="train longer: about ten minutes on two quiet cores")
    made.add_argument("--tiny", action="store_true", help="models and a text so small that it takes half a minute")
    made.add_json()
    return made


def run(arguments: list[str]) -> int:
    """Run the demo; returns the exit code of the first training that did not end well, else 0."""
    command = parser()
    given = command.parse(arguments)
    started = time.perf_counter()
    output = Path(given["output"])
    found = [family for family in TITLES if (output / family / OPTIONS_FILE).exists()]
    if found and not (output / COMPARISON).exists():
        command.error(
            f"{output / found[0]} holds a run that no demo has made, and the demo would replace it: name another --output"
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / COMPARISON).touch()  # says that the runs in this folder are a demo's
    as_json = given.pop("json", False)
    with words_aside(as_json):
        code, reports = _compare_and_write(given, output)
    if code:
        return code
    seconds = time.perf_counter() - started
    text = f"\nThe whole demo took {seconds / 60:.1f} minutes. Models, curves and reports: {output}"
    show({"output": str(output), "seconds": seconds, "reports": reports}, text, as_json)
    return 0


def _compare_and_write(given: dict, output: Path) -> tuple[int, dict]:
    """Train every model, print the comparison and a text; returns the exit code and the reports."""
    threads = given["threads"] or min(8, os.cpu_count() or 1)
    stage = Stages(len(TITLES))
    if not given["tiny"]:
        minutes = "about ten" if given["full"] else "under four"
        print(
            f"{STAGES} stages, {minutes} minutes on two quiet cores. Each trained model stays in {output}.", flush=True
        )
    stage.begin("the LEAP that comes with the package writes: two million parameters, a state of 52.5 KiB")
    words = ["generate", PROMPT, "--max-new-tokens", "60", "--seed", str(given["seed"])]
    print(f"$ hf-linear-attn {shlex.join(words)}\n", flush=True)
    code = run_as_process(words)
    if code:
        return code, {}
    reports: dict[str, dict] = {}
    for family, title in TITLES.items():
        stage.begin(title, learns=True)
        code = _train(family, output / family, given, threads)
        if code:
            return code, reports
        reports[family] = json.loads((output / family / "training_report.json").read_text())
        stage.learnt()
    stage.begin("side by side")
    print(comparison(reports, output))
    stage.begin("LEAP back from disk through AutoModelForCausalLM, writing")
    _write(output, given["seed"], threads)
    return 0, reports


class Stages:
    """Says which stage begins, and how long the rest will take, from what the models took that have learnt."""

    def __init__(self, models: int):
        self.count, self.waiting, self.started = 0, models, 0.0
        self.seconds: list[float] = []

    def begin(self, title: str, learns: bool = False) -> None:
        """The next stage."""
        self.count, self.started = self.count + 1, time.perf_counter()
        about = ""
        if learns and self.seconds:
            left = self.waiting * sum(self.seconds) / len(self.seconds)
            about = f" (about {left / self.waiting:.0f} s, and {left / 60:.1f} minutes to the end)"
        print(f"\n== {self.count} of {STAGES}: {title}{about}\n", flush=True)

    def learnt(self) -> None:
        """A model has learnt."""
        self.waiting -= 1
        self.seconds.append(time.perf_counter() - self.started)


def _train(family: str, folder: Path, given: dict, threads: int) -> int:
    """One run as a process of its own, so that its peak memory is its own and the command can be shown."""
    words = ["train", "--family", family, *EXTRA_WORDS.get(family, [])]
    sizes: dict[str, Any] = (
        {**SHARED, "steps": STEPS} | (FULL if given["full"] else {}) | (TINY if given["tiny"] else {})
    )
    sizes |= {} if given["steps"] is None else {"steps": given["steps"]}
    sizes["num-hidden-layers"] += EXTRA_LAYERS.get(family, 0)
    for name, value in (sizes | {"seed": given["seed"], "threads": threads}).items():
        words += [f"--{name}", str(value)]
    words += ["--cpu", "--output", str(folder), "--overwrite"]
    print(f"$ hf-linear-attn {shlex.join(words)}", flush=True)
    return run_as_process(words)


def run_as_process(words: list[str]) -> int:
    """Run `hf-linear-attn WORDS` in a new process, its words on stderr where ours go there; returns its exit code."""
    command = [sys.executable, "-m", "hf_linear_attn_cli", *words]
    with subprocess.Popen(command, stdout=sys.stderr if sys.stdout is sys.stderr else None) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # Ctrl-C reached the child, too, which now writes a checkpoint: wait for it.
                continue


def comparison(reports: dict[str, dict], output: Path) -> str:
    """The curves as a table and a picture, and the figures of each model."""
    from ..training.files import write_text_whole
    from ..training.learning_curve import save_curve, table

    curves = {name: report["curve"] for name, report in reports.items()}
    files = save_curve(
        curves,
        output,
        {name: report["tokens_per_step"] for name, report in reports.items()},
        "State of the Union speeches: LEAP, DANet and GPT-2 of the same size",
    )
    steps = [point["step"] for point in curves["leap"]["validation"]]
    losses = {name: {p["step"]: p["loss"] for p in curve["validation"]} for name, curve in curves.items()}
    curve_rows = [{"step": step, **{name: f"{losses[name][step]:.3f}" for name in reports}} for step in steps]
    rows = [
        {
            "label": name,
            "parameters": f"{report['parameters']:,}",
            "tokens_per_second": f"{report['tokens_per_second'] or 0:,.0f}",
            "memory": f"{report['peak_memory_mb']:.0f} MiB",
            "validation": f"{report['validation']['perplexity']:.1f}",
            "perplexity": f"{report['test']['perplexity']:.1f}",
            "bits": f"{report['test']['bits_per_byte']:.3f}",
            "seconds": f"{report['training_seconds']:.0f} s",
        }
        for name, report in reports.items()
    ]
    write_text_whole(output / COMPARISON, json.dumps(reports, indent=1) + "\n")
    return (
        f"validation loss (nats per token)\n{table(curve_rows, {name: name for name in ('step', *reports)})}\n\n"
        f"{table(rows, COLUMNS)}\n\ncurves: {', '.join(map(str, files))}"
    )


def _write(output: Path, seed: int, threads: int) -> None:
    """LEAP writes a paragraph; the state it needed stands beside the cache that GPT-2 needs for the same tokens."""
    import torch

    from ..modeling.shared.compat import cache_of
    from .generate import figures, load, write_text

    begin_work()
    torch.set_num_threads(threads)
    print(f'$ hf-linear-attn generate {output / "leap"} "{PROMPT}" --max-new-tokens 150 --seed {seed}\n')
    model, tokenizer = load(str(output / "leap"), "cpu")
    result = write_text(model, tokenizer, PROMPT, max_new_tokens=150, seed=seed)
    print(figures(result))
    baseline, _ = load(str(output / "gpt2"), "cpu")
    tokens = result["prompt_tokens"] + result["new_tokens"]
    with torch.no_grad():
        cache = cache_of(baseline(torch.ones(1, tokens, dtype=torch.long), use_cache=True))
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    print(f"GPT-2's cache after as many tokens: {size / 1024:.1f} KiB, and it grows with every token")
