"""Published claims beside what was measured here, from docs/data alone:  python -m benchmarks.claims

A claim is a comparison; a verdict is computed from the same comparison of ours. Texts, sizes and devices are other ones than in
the papers, so the numbers of a row are to be compared with one another and not across.
"""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from .encoder_tasks import chosen
from .language_model_contenders import VARIANTS
from .language_model_report import CHANGES, best_runs
from .long_range import PUBLISHED_ACCURACY
from .paper_wikitext import PUBLISHED

DATA = Path(__file__).parents[1] / "docs" / "data"
BUDGET = "[one budget](#six-language-models-one-budget)"
PAPER = "[paper's setting](#leap-against-gpt-2-at-the-papers-setting)"
SPEED = "[performance](performance.md)"
# of the comparison on one budget: what is given, and what the text is
TEXTS = {
    "speeches": ("perplexity", "the speeches"),
    "docs8": ("bits_per_byte", "docs8"),
    "docs8-slice": ("bits_per_byte", "a tenth of docs8"),
}
Row = tuple[str, str, str, str, str]


def main() -> None:
    """Print the table."""
    print("| claim | claimed | measured here | holds | how |\n|---|---|---|---|---|")
    for makers in (language_models, sea, danet, encoders, speed):
        for row in makers():
            print("| " + " | ".join(row) + " |")


def verdict(holds: list[bool]) -> str:
    """Of several comparisons."""
    if len(holds) == 1 or all(holds) or not any(holds):
        return "yes" if all(holds) else "no"
    return f"on {sum(holds)} of {len(holds)}"


def language_models() -> Iterator[Row]:
    """LEAP and DANet against GPT-2 and a Llama."""
    setting = {name: _paper(name) for name in PUBLISHED}
    for ours, file, below in (("windowed", "leap-windowed", True), ("all-global", "leap-global", False)):
        pairs = [(setting[ours], setting["gpt2"], "at its setting"), *_budget(file, "gpt2")]
        holds = [(a < b) == below for a, b, _ in pairs]
        claim = f"{ours} LEAP {'below' if below else 'above'} GPT-2 of the same size"
        claimed = f"perplexity {PUBLISHED[ours][1]} against {PUBLISHED['gpt2'][1]}"
        yield claim, claimed, _against(pairs), verdict(holds), f"{PAPER}, {BUDGET}"
    pairs = _budget("danet", "llama")
    holds = [a <= b for a, b, _ in pairs]
    yield (
        "causal DANet at most a Llama-style Transformer",
        "perplexity 8.79 against 8.88",
        f"{_against(pairs)}; {_tried()}",
        verdict(holds),
        BUDGET,
    )


def _tried() -> str:
    """The best variant of DANet on each text that has one, beside the Llama of the same seeds."""
    found: dict[str, list[str]] = {}
    for corpus, results in _texts():
        runs = results[corpus]["runs"]
        variants = [run for run in runs if run["model"] in VARIANTS and run["model"].startswith("danet")]
        if not variants:
            continue
        name = min(variants, key=lambda run: run["validation"]["loss"])["model"]
        best, llama = (best_runs([run for run in runs if run["model"] == each]) for each in (name, "llama"))
        seeds = {run["seed"] for run in best} & {run["seed"] for run in llama}
        a, b = (
            statistics.mean(run["test"]["bits_per_byte"] for run in each if run["seed"] in seeds)
            for each in (best, llama)
        )
        number = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        change = CHANGES[name].removeprefix("DANet: ")
        found.setdefault(change, []).append(f"{a:.3f} against {b:.3f} on {TEXTS[corpus][1]} ({number})")
    return "; ".join(f"with {change} {', '.join(each)}" for change, each in found.items())


def _against(pairs: list[tuple[float, float, str]]) -> str:
    """Perplexities with one digit, bits per byte with three."""
    words = [
        f"{a:.{3 if 'bits' in what else 1}f} against {b:.{3 if 'bits' in what else 1}f} {what}" for a, b, what in pairs
    ]
    return "; ".join(words)


def _paper(model: str) -> float:
    """Mean test perplexity of the seeds at the paper's setting."""
    files = sorted((DATA / "paper").glob(f"paper-{model}-seed*.json"))
    return statistics.mean(json.loads(file.read_text())["test"]["perplexity"] for file in files)


def _texts() -> Iterator[tuple[str, dict]]:
    """Names of the texts that are measured, each with all results."""
    found = json.loads((DATA / "language-models.json").read_text())
    return ((corpus, found) for corpus in TEXTS if "runs" in found.get(corpus, {}))


def _budget(ours: str, other: str) -> list[tuple[float, float, str]]:
    """Means of the seeds at each one's best rate, on each text that has both."""
    pairs = []
    for corpus, found in _texts():
        key, what = TEXTS[corpus]
        runs = [[run for run in found[corpus]["runs"] if run["model"] == name] for name in (ours, other)]
        if all(runs):
            a, b = (statistics.mean(run["test"][key] for run in best_runs(each)) for each in runs)
            pairs.append((a, b, f"on {what}" if key == "perplexity" else f"bits per byte on {what}"))
    return pairs


def sea() -> Iterator[Row]:
    """SEA and kernel attention distilled from the same teacher; classification; memory."""
    link = "[SmolLM2](#sea-smollm2-135m-on-the-speeches)"
    student, teacher = (_sea_language(name) for name in ("sea-k64-m256-task0.1", "teacher"))
    ours, base = student["perplexity"], teacher["perplexity"]
    yield (
        "SEA within 3 % of the Transformer that it replaces",
        "perplexity 13.5 against 13.9",
        f"{ours:.2f} against {base:.2f} with 64 keys a query ({ours / base - 1:+.1%}, {student['steps']} steps)",
        verdict([ours / base <= 1.03]),
        link,
    )
    more = student["with_other_k"]["128"]
    lower = math.exp(more["teacher_loss"])
    yield (
        "more keys after training: a better model",
        "below the dense model's 29.2 (OPT-125M)",
        f"beside its teacher {ours / base - 1:+.1%} with the 64 keys of training, {more['perplexity'] / lower - 1:+.1%} with 128",
        verdict([more["perplexity"] / lower < ours / base]),
        link,
    )
    kernel = _sea_language("kernel")
    other = kernel["perplexity"]
    yield (
        "kernel attention alone far above it",
        "30.6 against 13.9 (2.2 times)",
        f"{other:.1f} against {base:.2f} ({other / base:.1f} times, {kernel['steps']} steps)",
        verdict([other / base >= 30.6 / 13.9]),
        link,
    )
    pairs = []
    for file in sorted((DATA / "sea-classification").glob("*-seed0.json")):
        report = json.loads(file.read_text())
        pairs.append((report["students"]["13"]["accuracy"], report["teacher"]["accuracy"], report["set"]))
    yield (
        "SEA classifies as its teacher does",
        "MNLI 84.0 against 84.1",
        "; ".join(f"{name} {100 * a:.2f} against {100 * b:.2f}" for a, b, name in pairs) + " (13 keys a query)",
        verdict([a >= 0.99 * b for a, b, _ in pairs]) + " (at least 99 % of it)",
        "[MiniLM](#sea-minilm-that-classifies-texts)",
    )
    cases = {(c["name"], c["length"]): c for c in json.loads((DATA / "h200-sea.json").read_text())["cases"]}
    length = max(length for name, length in cases if name == "dense, eager, forward")
    ours, dense = cases["SEA, ours, forward", length], cases["dense, eager, forward", length]
    yield (
        "a layer of SEA needs less memory than dense attention",
        "81 % less at 8,192 tokens",
        f"{1 - ours['peak_gib'] / dense['peak_gib']:.0%} less at {length:,}",
        verdict([ours["peak_gib"] < dense["peak_gib"]]),
        SPEED,
    )
    yield (
        "and less time",
        "33 % of it at 8,192 tokens",
        f"{ours['ms'] / dense['ms']:.0%} of it at {length:,}",
        verdict([ours["ms"] < dense["ms"]]),
        SPEED,
    )


def _sea_language(name: str) -> dict:
    return json.loads((DATA / "sea-language" / f"{name}.json").read_text())


def danet() -> Iterator[Row]:
    """Long sequences."""
    scores = {}
    for name in ("danet", "transformer"):
        files = sorted((DATA / "long-range").glob(f"listops-{name}-seed*.json"))
        scores[name] = [100 * json.loads(file.read_text())["test"] for file in files]
    a, b = (statistics.mean(scores[name]) for name in ("danet", "transformer"))
    seeds = len(scores["danet"])
    yield (
        "DANet above a Transformer with rotary positions on ListOps",
        f"accuracy {PUBLISHED_ACCURACY['listops']['danet']} against {PUBLISHED_ACCURACY['listops']['transformer']}",
        f"{a:.2f} against {b:.2f} ({'one seed' if seeds == 1 else f'{seeds} seeds'})",
        verdict([a > b]) + ", the order",
        "[long sequences](#danet-on-long-sequences)",
    )


def encoders() -> Iterator[Row]:
    """DANet and BERT after the same pre-training."""
    runs = chosen(json.loads((DATA / "encoder-tasks" / "encoder-tasks.json").read_text())["finetuning"])
    scores = {
        names: 100 * statistics.mean(run["test"]["accuracy"] for run in of_rate)
        for names, (_, of_rate, _) in runs.items()
        if names[2] == "pretrained"
    }
    pairs = {name: [scores[name, family, "pretrained"] for family in ("danet", "bert")] for name, _, _ in scores}
    yield (
        "a DANet encoder classifies at least as well as BERT",
        "GLUE 86.4 against 85.2",
        "; ".join(f"{name} {ours:.2f} against {theirs:.2f}" for name, (ours, theirs) in pairs.items()) + " (accuracy)",
        verdict([ours >= theirs for ours, theirs in pairs.values()]),
        "[masked words, then classification](#danet-and-bert-masked-words-then-classification)",
    )


def speed() -> Iterator[Row]:
    """Ratios of speeds on one device."""
    cases = {(c["name"], c["length"]): c for c in json.loads((DATA / "h200-encoder.json").read_text())["cases"]}
    ratios = {
        length: cases["DANet, ours", length]["ktokens_per_s"]
        / cases["BERT, FlashAttention, compiled", length]["ktokens_per_s"]
        for length in (1024, 131072)
    }
    yield (
        "DANet encoder faster than BERT with FlashAttention",
        "1.22 times at 1,024 tokens, 40.9 at 131,072 (H100)",
        ", ".join(f"{ratio:.2f} at {length:,}" for length, ratio in ratios.items()) + " (H200)",
        verdict([ratio > 1 for ratio in ratios.values()]),
        SPEED,
    )
    names = {
        c["name"]: c for c in json.loads((DATA / "h200-leap-train.json").read_text())["cases"] if c["length"] == 1024
    }
    gpu = names["LEAP, ours, compiled"]["ktokens_per_s"] / names["GPT-2, SDPA, compiled"]["ktokens_per_s"]
    rows = json.loads((DATA / "cpu-leap-train.json").read_text())["rows"]
    cpu = next(r["speed_ratio"] for r in rows if "2,048" in r["job"] and r["contender"] == "GPT-2")
    yield (
        "windowed LEAP trains faster than GPT-2",
        "1.5 times (2,048 tokens)",
        f"{gpu:.2f} times (H200, 1,024 tokens), {cpu:.2f} times (two CPU cores, 2,048 tokens)",
        verdict([gpu > 1, cpu > 1]),
        SPEED,
    )


if __name__ == "__main__":
    main()
