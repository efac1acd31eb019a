"""Tables and pictures of `reproduction.language_models`, from its collected results alone; and which rate was best."""

import math
import statistics
from pathlib import Path
from typing import Any

from .language_model_contenders import MODELS, VARIANTS

NAMES = {
    "gpt2": "GPT-2",
    "llama": "Llama-style",
    "leap-windowed": "LEAP, windowed",
    "leap-global": "LEAP, all global",
    "fastformer": "Fastformer",
    "danet": "DANet, causal",
}
CHANGES = {
    "danet-relu": "DANet: ReLU instead of SwiGLU",
    "danet-scaled-norms": "DANet: the norms of the encoder for GLUE",
    "danet-all-global": "DANet: all layers global",
    "danet-window-64": "DANet: windows of 64",
    "danet-window-16": "DANet: windows of 16",
    "danet-more-heads": "DANet: as many heads as the Transformers",
    "danet-large-initial-weights": "DANet: initial weights up to 0.05 instead of 0.02",
    "danet-three-changes": "DANet: windows of 16, a head for 64 features and initial weights up to 0.05 together",
    "leap-rotary": "LEAP: rotary positions",
    "leap-exp": "LEAP: exponential focus",
    "leap-wide": "LEAP: windows of 4, 8, 16, 32, 64 and a global layer",
    "leap-more-heads": "LEAP: four times as many heads",
    "leap-wide-more-heads": "LEAP: these windows and four times as many heads",
    "leap-hybrid": "LEAP: preset hybrid",
    "leap-fixed-state": "LEAP: preset fixed-state",
    "leap-fixed-state-no-positions": "LEAP: preset fixed-state, no positions in layers that fade",
    "leap-hybrid-no-positions": "LEAP: preset hybrid, no positions in layers that fade",
    "leap-decay-alone": "LEAP: preset fixed-state, all layers fading",
    "danet-hybrid": "DANet: preset hybrid (full softmax in two of eight layers)",
    "danet-fixed-state": "DANet: preset fixed-state (softmax over 128 tokens in every other layer)",
    "danet-fixed-state-fading": "DANet: preset fixed-state, terms of the other layers fading",
}
PARTS = ("facts", "models", "claims", "costs", "rates", "variants", "cut")
# (ours, the other, whether ours is claimed to be lower, published perplexities of the two)
CLAIMS = (
    ("leap-windowed", "gpt2", "below", "54.2 against 62.9"),
    ("leap-global", "gpt2", "above", "86.8 against 62.9"),
    ("danet", "llama", "at most", "8.79 against 8.88"),
)


def tables(results: dict[str, Any], corpus: str | None = None, parts: list[str] | None = None) -> str:
    """For each corpus: the models, the published claims, costs, the learning rates that were tried, variants.

    corpus: this one alone. parts: some of `PARTS` alone, without headings; runs that were cut are shown only where asked for.
    """
    if corpus is not None and corpus not in results:
        raise SystemExit(f"there is no corpus {corpus!r} in the results: there are {', '.join(results)}")
    written = []
    for name, found in results.items():
        if corpus is None or name == corpus:
            made = _parts(name, found)
            kept = [text for part, text in made.items() if (part != "cut" if parts is None else part in parts)]
            written += [f"### {name}", *kept] if parts is None and kept else kept
    return "\n\n".join(written)


def summary(results: dict[str, Any]) -> str:
    """One line a model: its test figure on the two texts, and what it costs on the second (batches of 32 x 1,024)."""
    small, large = "speeches", "docs8"
    runs = {corpus: _by_model(results[corpus]["runs"]) for corpus in (small, large)}
    costs = results[large]["speed"]["models"]
    lines = [
        "| model | speeches, perplexity | docs8, bits per byte | training tokens/s | peak memory | decoding tokens/s "
        "| state after 1,024 tokens |",
        "|---|" + 6 * "---:|",
    ]
    for name in runs[small]:
        figures = [
            statistics.mean(run["test"][key] for run in best_runs(runs[corpus][name]))
            for corpus, key in ((small, "perplexity"), (large, "bits_per_byte"))
        ]
        found = costs[name]
        train, decode = (statistics.median(found[f"{kind}_tokens_per_second"]) for kind in ("training", "decoding"))
        lines.append(
            f"| {NAMES[name]} | {figures[0]:.1f} | {figures[1]:.3f} | {train:,.0f} | {found['peak_memory_mb']:,.0f} MiB "
            f"| {decode:,.0f} | {found['state_bytes'] / 1024:,.0f} KiB |"
        )
    return "\n".join(lines)


def _parts(corpus: str, found: dict) -> dict[str, str]:
    """The parts that the results of a corpus allow."""
    made = {}
    if "runs" in found:
        runs = _by_model(found["runs"])
        made = {"facts": _facts(found), "models": _models(corpus, runs), "claims": _claims(corpus, runs)}
        if measured := (found["speed"] or {}).get("models", {}):
            made["costs"] = _costs(measured)
        made["rates"] = _rates(runs)
        if variants := _by_model(found["runs"], tuple(VARIANTS)):
            made["variants"] = _variants(corpus, variants)
    if "unfinished" in found:
        made["cut"] = f"Runs that were cut:\n\n{_unfinished(found['unfinished'])}"
    return made


def _by_model(runs: list[dict], models=tuple(MODELS)) -> dict[str, list[dict]]:
    return {name: kept for name in models if (kept := [run for run in runs if run["model"] == name])}


def best_rate(results: list[dict], seed: int) -> float:
    """The learning rate with the lowest validation loss; a run that diverged is the worst."""

    def loss(result: dict) -> float:
        value = result["validation"]["loss"]
        return value if math.isfinite(value) else math.inf

    return min((result for result in results if result["seed"] == seed), key=loss)["rate"]


def best_runs(runs: list[dict]) -> list[dict]:
    """The runs at the best learning rate, by seed."""
    rate = best_rate(runs, min(run["seed"] for run in runs))
    return sorted((run for run in runs if run["rate"] == rate), key=lambda run: run["seed"])


def _facts(found: dict) -> str:
    run = found["runs"][0]
    at_once = sorted({run["runs_at_once"] for run in found["runs"]})
    beside = f"{at_once[0]} to {at_once[-1]}" if len(at_once) > 1 else f"{at_once[0]}"
    recipe, machine = run["setting"]["recipe"], run["machine"]
    compiled = "torch.compile; " if recipe.get("compile") else ""
    tokens = run["steps"] * recipe["batch_size"] * recipe["length"]
    sha = run["text"].get("corpus_sha256", run["text"]["sha256"])
    return (
        f"{tokens / 1e6:.1f} million training tokens in {run['steps']:,} steps of {recipe['batch_size']} x "
        f"{recipe['length']:,}; AdamW, weight decay {recipe['weight_decay']}, {recipe['schedule']} schedule with "
        f"{recipe['warmup']:.0%} warm-up, clip {recipe['clip']}, {recipe['precision']} autocast, no dropout; "
        f"{compiled}{beside} runs at once on one {machine['device']}, PyTorch {machine['torch']}, transformers "
        f"{machine['transformers']}, {machine['date']}. Text: {run['text'].get('description', run['text']['corpus'])}, "
        f"{run['text']['bytes']['train']:,} bytes of training text, sha256 {sha[:16]}."
    )


def _models(corpus: str, runs: dict[str, list[dict]]) -> str:
    bytes_alone = corpus.startswith("docs8")
    unit = "test bits per byte" if bytes_alone else "test perplexity"
    head = ["model", "parameters", "rate", f"{unit} (each seed)", "mean"]
    head += [] if bytes_alone else ["bits per byte"]
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---:|---|" + "---:|" * (len(head) - 4)]
    for name, all_runs in runs.items():
        best = best_runs(all_runs)
        key = "bits_per_byte" if bytes_alone else "perplexity"
        digits = 3 if bytes_alone else 1
        values = [run["test"][key] for run in best]
        cells = [NAMES[name], f"{best[0]['parameters']:,}", f"{best[0]['rate']:g}"]
        cells += [", ".join(f"{value:.{digits}f}" for value in values), f"{statistics.mean(values):.{digits}f}"]
        cells += [] if bytes_alone else [f"{statistics.mean(run['test']['bits_per_byte'] for run in best):.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _unfinished(runs: list[dict]) -> str:
    """Validation losses after the last step that every run reached, the rate on its way down in none of them."""
    step = min(run["curve"][-1]["step"] for run in runs)
    lines = [
        f"| model | validation loss (nats) after {step:,} of {runs[0]['steps']:,} steps, at each rate |",
        "|---|---|",
    ]
    for name, kept in _by_model(runs).items():
        losses = {run["rate"]: p["validation"] for run in kept for p in run["curve"] if p["step"] == step}
        lines.append(f"| {NAMES[name]} | " + ", ".join(f"{r:g}: {losses[r]:.3f}" for r in sorted(losses)) + " |")
    return "\n".join(lines)


def _costs(measured: dict) -> str:
    lines = [
        "| model | training tokens/s | peak memory, MiB | decoding tokens/s | state, KiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in measured.items():
        memory = found["peak_memory_mb"]
        cells = [
            NAMES[name],
            f"{statistics.median(found['training_tokens_per_second']):,.0f}",
            "-" if memory is None else f"{memory:,.0f}",
            f"{statistics.median(found['decoding_tokens_per_second']):,.0f}",
            f"{found['state_bytes'] / 1024:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rates(runs: dict[str, list[dict]]) -> str:
    lines = ["| model | validation loss (nats) at each learning rate tried, first seed |", "|---|---|"]
    for name, all_runs in runs.items():
        first = min(run["seed"] for run in all_runs)
        tried = sorted((run for run in all_runs if run["seed"] == first), key=lambda run: run["rate"])
        lines.append(
            f"| {NAMES[name]} | " + ", ".join(f"{r['rate']:g}: {r['validation']['loss']:.3f}" for r in tried) + " |"
        )
    return "\n".join(lines)


def _variants(corpus: str, runs: dict[str, list[dict]]) -> str:
    """What was tried where a claim did not hold."""
    key, digits = ("bits_per_byte", 3) if corpus.startswith("docs8") else ("perplexity", 1)
    unit = key.replace("_", " ")
    lines = [f"| tried beside them, first seed | validation loss (nats) at each rate | test {unit} |", "|---|---|---:|"]
    for name, all_runs in runs.items():
        losses = {run["rate"]: run["validation"]["loss"] for run in all_runs}
        best = best_runs(all_runs)[0]
        each = ", ".join(f"{rate:g}: {losses[rate]:.3f}" for rate in sorted(losses))
        lines.append(f"| {CHANGES[name]} | {each} | {best['test'][key]:.{digits}f} |")
    return "\n".join(lines)


def _claims(corpus: str, runs: dict[str, list[dict]]) -> str:
    lines = ["| claim | published (perplexity) | measured here | holds |", "|---|---|---|---|"]
    key, digits = ("bits_per_byte", 3) if corpus.startswith("docs8") else ("perplexity", 1)
    for ours, other, relation, published in CLAIMS:
        if ours not in runs or other not in runs:
            continue
        values = [[run["test"][key] for run in best_runs(runs[name])] for name in (ours, other)]
        a, b = map(statistics.mean, values)
        holds = {"below": a < b, "above": a > b, "at most": a <= b}[relation]
        clear = max(values[0]) < min(values[1]) or min(values[0]) > max(values[1])
        seeds = "seeds apart" if clear else "seeds overlap"
        if min(map(len, values)) == 1:
            seeds = "one seed"
        lines.append(
            f"| {NAMES[ours]} {relation} {NAMES[other]} | {published} | {a:.{digits}f} against {b:.{digits}f} "
            f"({100 * (a / b - 1):+.1f} %; {seeds}) | {'yes' if holds else 'no'} |"
        )
    return "\n".join(lines)


def pictures(results: dict[str, Any], folder: Path) -> list[Path]:
    """Validation loss against tokens and against seconds, one picture a corpus: each model's best rate, mean of its seeds.

    Seconds are tokens over the speed that `speed` measured, the models taking turns: the sweep ran on a shared device.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for corpus, found in results.items():
        if "runs" not in found:
            continue
        runs = _by_model(found["runs"])
        measured = (found["speed"] or {}).get("models", {})
        figure, axes = plt.subplots(
            1, 2 if measured else 1, figsize=(10, 4.5), sharey=True, layout="constrained", squeeze=False
        )
        for number, (name, all_runs) in enumerate(runs.items()):
            tokens, losses = _mean_curve(corpus, best_runs(all_runs))
            style = {"color": f"C{number}", "label": NAMES[name], "marker": ".", "linewidth": 1.4}
            axes[0, 0].plot([t / 1e6 for t in tokens], losses, **style)
            if name in measured:
                rate = statistics.median(measured[name]["training_tokens_per_second"])
                axes[0, 1].plot([t / rate for t in tokens], losses, **style)
        axes[0, 0].set(xlabel="training tokens (million)", ylabel="validation, bits per byte", title=corpus)
        ends = [_mean_curve(corpus, best_runs(each))[1][-1] for each in runs.values()]
        axes[0, 0].set_ylim(min(ends) * 0.97, max(ends) * 1.12)
        if measured:
            axes[0, 1].set(xlabel="seconds, at the speed measured in turn", title=f"{corpus}, against time")
        for each in axes.flat:
            each.grid(alpha=0.3)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), fontsize=9)
        files.append(folder / f"language_models_{corpus}.png")
        figure.savefig(files[-1], dpi=120)
        plt.close(figure)
    return files


def _mean_curve(corpus: str, runs: list[dict]) -> tuple[list[float], list[float]]:
    """Tokens and mean validation bits per byte at each point of the first run's curve; other runs' points are joined by lines."""
    import numpy as np

    recipe = runs[0]["setting"]["recipe"]
    per_nat = runs[0]["validation"]["bits_per_byte"] / runs[0]["validation"]["loss"]
    begin = max(run["curve"][0]["step"] for run in runs)
    steps = [point["step"] for point in runs[0]["curve"] if point["step"] >= begin]
    each = [
        np.interp(steps, [p["step"] for p in run["curve"]], [p["validation"] for p in run["curve"]]) for run in runs
    ]
    return [step * recipe["batch_size"] * recipe["length"] for step in steps], list(per_nat * np.mean(each, axis=0))
