"""The pictures of the README and of the page that chooses a family.

    python docs/scripts/front_page.py

writes docs/images/leap_layer.svg (what a layer does, computed by the layer itself), speed_against_context.svg (from docs/data)
and which_family.svg (the questions of docs/choose.md).
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from hf_linear_attn import LeapAttention, LeapConfig

DOCS = Path(__file__).parents[1]
OURS, THEIRS, GREY = "#3949ab", "#c75b12", "#616161"
plt.rcParams.update({"font.size": 10, "svg.hashsalt": "hf-linear-attn", "svg.fonttype": "path"})


def leap_layer():
    """Tokens with their focus weights, the weights with which three tokens see what is before them, and the state."""
    length, window, seen = 16, 5, (6, 10, 15)
    config = LeapConfig(hidden_size=32, num_attention_heads=1, num_hidden_layers=1, layer_windows=[window])
    config.initializer_range = 0.6
    with torch.no_grad():
        layer = LeapAttention(config, 0).eval()
        hidden = torch.randn(1, length, 32)
        focus = layer(hidden, output_focus_weights=True).focus_weights[0, 0].tolist()
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 3.9), layout="constrained", sharex=True, height_ratios=(1.1, 1.5)
    )
    top.bar(range(length), focus, color=OURS, width=0.7)
    top.set_title("1. Each token gets one positive weight (the focus weight)", loc="left", fontsize=10)
    bottom.set_title(
        f"2. A token sees the weighted mean of its window (here {window} tokens; in a global layer, of all so far)",
        loc="left",
        fontsize=10,
    )
    for row, token in enumerate(seen):
        inside = range(token - window + 1, token + 1)
        total = sum(focus[j] for j in inside)
        for j in range(length):
            share = focus[j] / total if j in inside else 0
            bottom.add_patch(plt.Rectangle((j - 0.35, -row - 0.35), 0.7, 0.7, color=OURS, alpha=share * 2.6, lw=0))
            bottom.add_patch(plt.Rectangle((j - 0.35, -row - 0.35), 0.7, 0.7, fill=False, ec="#bdbdbd", lw=0.6))
        bottom.add_patch(plt.Rectangle((token - 0.35, -row - 0.35), 0.7, 0.7, fill=False, ec=THEIRS, lw=1.8))
        bottom.text(-0.9, -row, f"token {token + 1}", ha="right", va="center")
    bottom.set_xlabel(
        "3. The next token needs the tokens of the window alone (a global layer: its sums): the state never grows"
    )
    bottom.set(ylim=(-2.6, 0.6), xlim=(-2.9, length - 0.4), yticks=[], xticks=range(length))
    bottom.set_xticklabels([str(j + 1) for j in range(length)])
    top.set(yticks=[])
    for axes in (top, bottom):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_visible(axes is top)
        axes.tick_params(length=0)
    return figure


def speed_against_context():
    """A decoding step on one GPU, and tokens a second on two CPU cores, at short and long contexts."""
    decode = json.loads((DOCS / "data" / "h200-decode.json").read_text())["cases"]
    figure, (gpu, cpu) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, label, style in (
        ("LEAP, ours, step", "LEAP", {"color": OURS, "lw": 2.5, "ms": 8}),
        ("DANet, ours, step", "DANet, causal", {"color": "#66bb6a", "ms": 4}),
        (
            "GPT-2, static cache, compiled step",
            "GPT-2 with its cache (on the GPU: static, compiled)",
            {"color": THEIRS},
        ),
    ):
        cases = sorted((case["length"], case["ms"]) for case in decode if case["name"] == name)
        gpu.plot(*zip(*cases), "o-", label=label, **style)
    gpu.set(xscale="log", ylim=(0, 4), xlabel="tokens of context", ylabel="ms a token")
    gpu.set_xticks([1024, 16384, 1048576], ["1,024", "16,384", "1,048,576"])
    gpu.set_title("One H200: batch 16, 12 layers of width 768", fontsize=10)
    gpu.minorticks_off()
    rows = json.loads((DOCS / "data" / "cpu-leap-decode.json").read_text())["rows"]
    speeds = {(row["contender"], row["job"].rpartition(" ")[2]): row["tokens_per_second"] for row in rows}
    for place, context in enumerate(("100", "8,000")):
        for shift, (name, colour) in zip((-0.2, 0.2), {"LEAP (ours), state": OURS, "GPT-2, cache": THEIRS}.items()):
            speed = speeds[name, context]
            cpu.bar(place + shift, speed, 0.38, color=colour)
            cpu.text(place + shift, speed, f"{speed:,.0f}", ha="center", va="bottom")
    cpu.set_xticks([0, 1], ["100", "8,000"])
    cpu.set(xlabel="tokens of context", ylabel="tokens a second", ylim=(0, 950))
    cpu.set_title("Two CPU cores: batch 8, 6 layers of width 256", fontsize=10)
    for axes in (gpu, cpu):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


QUESTIONS = {  # name: (x, y, text)
    "start": (0.0, 3.0, "A pretrained Transformer\nthat you want to keep?"),
    "long": (-3.0, 2.0, "Texts above 60,000 tokens,\na GPU, time to distil?"),
    "task": (3.0, 2.0, "Does the model write text,\nor read it (labels, spans)?"),
    "recall": (1.2, 1.0, "Must single far-away tokens\nbe recalled exactly?"),
    "size": (0.0, 0.0, "Constant cost a token, or\nlittle text to train on?"),
}
ANSWERS = {
    "SEA": (-4.2, 0.55, "SEA"),
    "keep": (-2.35, 0.55, "keep it\nas it is"),
    "DANet": (4.6, 0.55, "DANet\nencoder"),
    "mix": (2.9, -0.45, "a hybrid, or\na Transformer"),
    "LEAP": (-1.3, -1.4, "LEAP,\nwindowed"),
    "other": (1.3, -1.4, "a Llama-style\nTransformer"),
}
ARROWS = [
    ("start", "long", "yes"),
    ("start", "task", "no"),
    ("long", "SEA", "yes"),
    ("long", "keep", "no"),
    ("task", "recall", "writes"),
    ("task", "DANet", "reads"),
    ("recall", "mix", "yes"),
    ("recall", "size", "no"),
    ("size", "LEAP", "yes"),
    ("size", "other", "no"),
]


def which_family():
    """The questions of the page as a tree."""
    figure, axes = plt.subplots(figsize=(6.8, 6), layout="constrained")
    places = QUESTIONS | ANSWERS
    for begin, end, word in ARROWS:
        (x, y, _), (to_x, to_y, _) = places[begin], places[end]
        axes.annotate(
            "",
            (to_x, to_y + 0.27),
            (x, y - 0.27),
            arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.3, "shrinkA": 0, "shrinkB": 0},
        )
        axes.text(
            (x + to_x) / 2,
            (y + to_y) / 2,
            word,
            ha="center",
            va="center",
            bbox={"fc": "white", "ec": "none", "pad": 1.5},
            color=GREY,
        )
    for found, colour, ink in ((QUESTIONS, "#eceff1", "black"), (ANSWERS, OURS, "white")):
        for name, (x, y, text) in found.items():
            face = GREY if name in ("keep", "mix", "other") else colour
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                color=ink,
                bbox={"boxstyle": "round,pad=0.5", "fc": face, "ec": "none" if found is ANSWERS else GREY},
            )
    axes.set(xlim=(-5.1, 5.5), ylim=(-1.9, 3.5))
    axes.axis("off")
    return figure


def main() -> None:
    """Draw all three."""
    for make in (leap_layer, speed_against_context, which_family):
        torch.manual_seed(3)
        figure = make()
        file = DOCS / "images" / f"{make.__name__}.svg"
        figure.savefig(file, metadata={"Date": None}, facecolor="white")
        plt.close(figure)
        print(file.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
