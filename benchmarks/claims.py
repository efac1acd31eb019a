"""Published claims beside what was measured here, from docs/data alone:  python -m benchmarks.claims

A claim is a comparison; a verdict is computed from the same comparison of ours. Texts, sizes and devices are other ones than in
the papers, so the numbers of a row are to be compared with one another and not across.
"""

import statistics
from collections.abc import Iterator

from reproduction.danet_ablations import losses
from reproduction.language_model_contenders import VARIANTS
from reproduction.language_model_report import CHANGES, best_runs
from reproduction.long_range import PUBLISHED_ACCURACY
from reproduction.paper_wikitext import PUBLISHED

from .figures import (
    cpu,
    data,
    encoder,
    lm,
    long_range,
    memory,
    paper,
    runs,
    sea_accuracy,
    sea_language,
    sea_of_teacher,
    times,
)

BUDGET = "[one budget](results/language_models.md#six-language-models-one-budget)"
PAPER = "[paper's setting](results/language_models.md#leap-against-gpt-2-at-the-papers-setting)"
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
    for makers in (language_models, danet_parts, long_sequences, encoders, sea, speed):
        for row in makers():
            print("| " + " | ".join(row) + " |")


def verdict(holds: list[bool]) -> str:
    """Of several comparisons."""
    if len(holds) == 1 or all(holds) or not any(holds):
        return "yes" if all(holds) else "no"
    return f"on {sum(holds)} of {len(holds)}"


def language_models() -> Iterator[Row]:
    """LEAP and DANet against GPT-2 and a Llama."""
    setting = {name: paper(name) for name in PUBLISHED}
    for ours, file, below in (("windowed", "leap-windowed", True), ("all-global", "leap-global", False)):
        pairs = [(setting[ours], setting["gpt2"], "at its setting"), *_budget(file, "gpt2")]
        holds = [(a < b) == below for a, b, _ in pairs]
        claim = f"{ours} LEAP {'below' if below else 'above'} GPT-2 of the same size"
        claimed = f"perplexity {PUBLISHED[ours][1]} against {PUBLISHED['gpt2'][1]}"
        yield claim, claimed, _against(pairs), verdict(holds), f"{PAPER}, {BUDGET}"
    pairs = [pair for pair in _budget("leap-windowed", "gpt2") if "docs8" in pair[2]]
    ratios = [a / b for a, b, _ in pairs]
    yield (
        "LEAP on GPT-2's curve of loss against compute",
        "on it (text as bytes, one pass)",
        f"{_against(pairs)}: ahead at first, behind later",
        verdict([abs(ratio - 1) < 0.05 for ratio in ratios]),
        BUDGET,
    )
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
    for corpus in _texts():
        variants = [run for name in VARIANTS if name.startswith("danet") for run in runs(corpus, name)]
        if not variants:
            continue
        name = min(variants, key=lambda run: run["validation"]["loss"])["model"]
        seeds = set.intersection(*({run["seed"] for run in best_runs(runs(corpus, each))} for each in (name, "llama")))
        a, b = (statistics.mean(lm(corpus, each, seed=seed) for seed in seeds) for each in (name, "llama"))
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


def _texts() -> Iterator[str]:
    """Names of the texts that are measured."""
    return (corpus for corpus in TEXTS if "runs" in data("language-models.json").get(corpus, {}))


def _budget(ours: str, other: str) -> list[tuple[float, float, str]]:
    """Means of the seeds at each one's best rate, on each text that has both."""
    pairs = []
    for corpus in _texts():
        key, what = TEXTS[corpus]
        if runs(corpus, ours) and runs(corpus, other):
            where = f"on {what}" if key == "perplexity" else f"bits per byte on {what}"
            pairs.append((lm(corpus, ours), lm(corpus, other), where))
    return pairs


def danet_parts() -> Iterator[Row]:
    """What the DANet paper says of its own parts."""
    link = "[parts of DANet](results/danet.md#parts-of-danet-changed-one-at-a-time)"
    found = data("danet-ablations.json")["changes"]
    loss = {name: losses(found, name)[0] for name in found}
    wide, narrow = lm("docs8-slice", "danet-all-global"), lm("docs8-slice", "danet-window-16")
    yield (
        "local layers beside global ones: a better DANet",
        "masked words, 16,384 tokens a row: loss 1.689 against 2.843",
        f"masked words: {loss['base']:.2f} against {loss['global']:.2f}; next byte on a tenth of docs8: {narrow:.3f} with "
        f"windows of 16 against {wide:.3f}",
        verdict([loss["base"] < loss["global"], narrow < wide]),
        f"{link}, {BUDGET}",
    )
    one, more = lm("docs8-slice", "danet"), lm("docs8-slice", "danet-more-heads")
    yield (
        "one head of DANet is better than several",
        "masked words: loss 1.564 with 1, 1.627 with 4, 1.691 with 16",
        f"masked words: {loss['base']:.2f}, {loss['heads4']:.2f}, {loss['heads16']:.2f}; next byte on a tenth of docs8: "
        f"{one:.3f} with 1, {more:.3f} with 6",
        verdict([loss["base"] < loss["heads4"], loss["heads4"] < loss["heads16"], one < more]),
        f"{link}, {BUDGET}",
    )
    yield (
        "MaxNorm at least as good as LayerNorm in DANet",
        "61.9 % against 61.6 % of masked words in bfloat16",
        f"loss {loss['base']:.2f} against {loss['layernorm']:.2f}",
        verdict([loss["base"] <= loss["layernorm"]]),
        link,
    )
    yield (
        "and DANet with LayerNorm fails in float16",
        "fails; 61.3 % with MaxNorm",
        f"loss {loss['layernorm-float16']:.2f} (autocast), with MaxNorm {loss['base-float16']:.2f}",
        verdict([loss["layernorm-float16"] > 2 * loss["base-float16"]]) + ", only worse",
        link,
    )


def long_sequences() -> Iterator[Row]:
    """ListOps and pixels."""
    link = "[long sequences](results/danet.md#danet-on-long-sequences)"
    listops = [100 * long_range("listops", name) for name in ("danet", "transformer")]
    pixels = [100 * long_range("fashion", name) for name in ("danet", "transformer")]
    claimed = PUBLISHED_ACCURACY["listops"]
    yield (
        "DANet above a Transformer with rotary positions on ListOps",
        f"accuracy {claimed['danet']} against {claimed['transformer']}",
        f"{listops[0]:.2f} against {listops[1]:.2f} after {long_range('listops', 'danet', 'epochs'):.1f} passes over the data",
        verdict([listops[0] > listops[1]]) + ", the order",
        link,
    )
    yield (
        "DANet below it on pictures, pixel by pixel",
        "CIFAR-10: 72.55 against 75.04",
        f"Fashion-MNIST: {pixels[0]:.2f} against {pixels[1]:.2f}",
        verdict([pixels[0] < pixels[1]]) + " (another, easier set)",
        link,
    )


def encoders() -> Iterator[Row]:
    """DANet and BERT after the same pre-training."""
    pairs = {texts: [100 * encoder(texts, family) for family in ("danet", "bert")] for texts in ("r8", "spam-assassin")}
    yield (
        "a DANet encoder classifies at least as well as BERT",
        "GLUE 86.4 against 85.2",
        "; ".join(f"{name} {ours:.2f} against {theirs:.2f}" for name, (ours, theirs) in pairs.items()) + " (accuracy)",
        verdict([ours >= theirs for ours, theirs in pairs.values()]),
        "[masked words, then classification](results/danet.md#danet-and-bert-masked-words-then-classification)",
    )


def sea() -> Iterator[Row]:
    """SEA and kernel attention distilled from the same teacher; classification; a layer's memory and time."""
    link = "[SmolLM2](results/sea.md#sea-smollm2-135m-on-the-speeches)"
    teacher, dense = sea_language("teacher"), sea_language("dense")
    students = {weight: f"sea-k64-m256{name}" for weight, name in {"0.5": "", "0.1": "-task0.1"}.items()}
    each = ", ".join(f"{sea_language(name):.2f} where labels weigh {weight}" for weight, name in students.items())
    yield (
        "SEA at most the Transformer that it replaces",
        "perplexity 13.5 against 13.9 (OPT-1.3B)",
        f"{each}, against {teacher:.2f}, with 64 keys a query; softmax distilled likewise: {dense:.2f}",
        verdict([sea_language(name) <= teacher for name in students.values()]),
        link,
    )
    few, more = sea_of_teacher(students["0.1"]), sea_of_teacher(students["0.1"], 128)
    yield (
        "more keys after training: a better model",
        "below the dense model's 29.2 (OPT-125M)",
        f"beside its teacher {few - 1:+.1%} with the 64 keys of training, {more - 1:+.1%} with 128",
        verdict([more < few]),
        link,
    )
    kernel = sea_language("kernel")
    yield (
        "kernel attention alone far above it",
        "30.6 against 13.9 (2.2 times)",
        f"{kernel:.1f} against {teacher:.2f} ({kernel / teacher:.1f} times)",
        verdict([kernel / teacher >= 30.6 / 13.9]),
        link,
    )
    pairs = [(texts, sea_accuracy(texts, 13), sea_accuracy(texts)) for texts in ("bbc", "r8", "spam-assassin")]
    yield (
        "SEA classifies as its teacher does",
        "MNLI 84.0 against 84.1",
        "; ".join(f"{name} {100 * a:.2f} against {100 * b:.2f}" for name, a, b in pairs) + " (13 keys a query)",
        verdict([a >= 0.99 * b for _, a, b in pairs]) + " (at least 99 % of it)",
        "[MiniLM](results/sea.md#sea-minilm-that-classifies-texts)",
    )
    layers = "SEA, ours, forward", "dense, eager, forward"
    yield (
        "a layer of SEA needs less memory than dense attention",
        "81 % less at 8,192 tokens",
        f"{1 - memory('sea', *layers, 8192):.0%} less at 8,192",
        verdict([memory("sea", *layers, 8192) < 1]),
        SPEED,
    )
    shares = {length: 1 / times("sea", *layers, length) for length in (8192, 2048)}
    yield (
        "and less time from about 8,192 tokens on",
        "33 % of it at 8,192 tokens, 139 % at 2,048",
        ", ".join(f"{share:.0%} of it at {length:,}" for length, share in shares.items()),
        verdict([shares[8192] < 1]) + ", and sooner",
        SPEED,
    )


def speed() -> Iterator[Row]:
    """Ratios of speeds on one device."""
    bert = {n: times("encoder", "DANet, ours", "BERT, FlashAttention, compiled", n) for n in (128, 1024, 16384, 131072)}
    yield (
        "DANet encoder faster than BERT with FlashAttention",
        "1.05, 1.22, 6.00 and 40.9 times at 128, 1,024, 16,384 and 131,072 tokens (H100)",
        ", ".join(f"{ratio:.{2 if ratio < 10 else 1}f}" for ratio in bert.values()) + " (H200)",
        verdict([ratio > 1 for ratio in bert.values()]),
        SPEED,
    )
    theirs = "linear attention (1 + elu), compiled"
    linear = {n: times("encoder", "DANet, ours", theirs, n) for n in (128, 1024, 16384, 131072)}
    yield (
        "and than linear attention",
        "1.37, 1.23, 1.24 and 1.22 times at 128, 1,024, 16,384 and 131,072 (H100)",
        ", ".join(f"{ratio:.2f}" for ratio in linear.values()) + " (H200)",
        verdict([ratio > 1 for ratio in linear.values()]),
        SPEED,
    )
    two = {
        n: cpu("danet-forward-330m", f"forward, {size}", "BERT")
        for n, size in {128: "8 x 128", 4096: "1 x 4,096"}.items()
    }
    yield (
        "and than BERT on a CPU",
        "1.87 times at 128, 21 at 4,096 (12 cores)",
        ", ".join(f"{ratio:.2f} at {length:,}" for length, ratio in two.items()) + " (two cores)",
        verdict([ratio > 1 for ratio in two.values()]),
        SPEED,
    )
    gpu = times("leap-train", "LEAP, ours, compiled", "GPT-2, SDPA, compiled", 1024)
    two_cores = cpu("leap-train", "training step, 1 x 2,048", "GPT-2")
    yield (
        "windowed LEAP trains faster than GPT-2",
        "1.5 times (2,048 tokens)",
        f"{gpu:.2f} times (H200, 1,024 tokens), {two_cores:.2f} times (two CPU cores, 2,048 tokens)",
        verdict([gpu > 1, two_cores > 1]),
        SPEED,
    )


if __name__ == "__main__":
    main()
