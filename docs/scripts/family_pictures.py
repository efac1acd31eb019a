"""One picture a family, drawn from what the mechanisms really compute on small random inputs.

    python docs/scripts/family_pictures.py

writes docs/images/family_*.svg.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from hf_linear_attn import FastformerAttention, FastformerConfig, LeapAttention, LeapConfig
from hf_linear_attn.modeling.danet.dense_attention import pattern_mask
from hf_linear_attn.modeling.fastformer.modeling_fastformer import FastformerEncoderAttention
from hf_linear_attn.modeling.sea.attention import SeaAttentionCore, SeaOptions

IMAGES = Path(__file__).parents[1] / "images"
LENGTH = 24
plt.rcParams.update({"font.size": 9, "svg.hashsalt": "hf-linear-attn", "svg.fonttype": "none"})


def show(axes, matrix, title, colour="viridis", labels=("keys j", "queries i")) -> None:
    """A matrix with a title and no ticks."""
    axes.imshow(matrix, cmap=colour, aspect="auto", interpolation="nearest", vmin=0)
    axes.set(title=title, xticks=[], yticks=[], xlabel=labels[0], ylabel=labels[1])


def leap():
    """The focus weights of one layer, and the attention rows of a global layer and two windows."""
    windows = [None, 8, 4]
    config = LeapConfig(
        hidden_size=32, num_attention_heads=1, num_hidden_layers=3, layer_windows=windows, initializer_range=0.5
    )
    hidden = torch.randn(1, LENGTH, 32)
    layer = LeapAttention(config, 0).eval()
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.7), layout="constrained")
    weights = layer(hidden, output_focus_weights=True).focus_weights[0, 0]
    axes[0].bar(range(LENGTH), weights.detach(), color="C0")
    axes[0].set(title="one weight a token", xlabel="tokens j", ylabel="focus weight", xticks=[])
    for place, window in zip(axes[1:], windows):
        layer.window = window
        rows = layer(hidden, output_attentions=True).attentions[0, 0]
        show(place, rows.detach(), "global: all so far" if window is None else f"window of {window}")
    return figure


def fastformer():
    """Weights of the second pooling: causal rows, and the one row that all tokens share in the encoder."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
    hidden = torch.randn(1, LENGTH, 32)
    for place, window in zip(axes, (None, 6)):
        config = FastformerConfig(
            hidden_size=32, num_attention_heads=1, num_hidden_layers=1, layer_windows=[window], initializer_range=0.5
        )
        layer = FastformerAttention(config, 0).eval()
        torch.nn.init.normal_(layer.query_vector)
        torch.nn.init.normal_(layer.key_vector)
        rows = layer(hidden, output_attentions=True).attentions[0, 0]
        show(place, rows.detach(), "causal, global" if window is None else f"causal, window of {window}")
    encoder = FastformerEncoderAttention(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.35)
    rows = encoder(hidden, output_attentions=True).attentions[0, 0]
    show(axes[2], rows.detach(), "encoder: one row for all queries")
    return figure


def danet():
    """Who sees whom in each pattern, and the two orders of one product."""
    figure, axes = plt.subplots(1, 5, figsize=(11, 2.7), layout="constrained")
    ranks = torch.arange(LENGTH)
    names = {"g": "g: global", "l": "l: local", "sl": "sl: shifted local", "sw": "sw: sliding (causal)"}
    for place, (code, title) in zip(axes, names.items()):
        mask = pattern_mask(code, ranks, ranks, is_causal=code == "sw", window_size=8)
        show(place, mask.float(), title, "Blues")
    lengths = [2**n for n in range(5, 15)]
    size = 1024
    axes[4].loglog(lengths, [4 * n * n * size for n in lengths], label="(Q K') V")
    axes[4].loglog(lengths, [4 * n * size * size for n in lengths], label="Q (K' V)")
    axes[4].axvline(size, color="grey", linestyle=":", linewidth=1)
    axes[4].set(title="operations, d = 1024", xlabel="length")
    axes[4].legend()
    return figure


def sea():
    """From the estimate to sparse attention: compressed attention, the kept cells, the keys behind them, the result."""
    options = SeaOptions(
        num_heads=1, head_dim=16, causal=True, k=6, predictor_length=16, max_positions=64, backend="dense"
    )
    core = SeaAttentionCore(options).eval()
    query, key, value = (2 * torch.randn(1, 1, 48, 16) for _ in range(3))
    with torch.no_grad():
        out = core(query, key, value, output_attentions=True)
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    show(axes[0], out.estimated_probs[0, 0], "1. estimate, M cells a row", labels=("cells", "queries"))
    show(axes[1], out.cells[0, 0].float(), "2. the largest cells are kept", "Blues", ("cells", "queries"))
    show(axes[2], out.attention_probs[0, 0], "3. exact attention on their keys")
    return figure


def main() -> None:
    """Draw all four."""
    IMAGES.mkdir(exist_ok=True)
    for make in (leap, fastformer, danet, sea):
        torch.manual_seed(0)
        figure = make()
        file = IMAGES / f"family_{make.__name__}.svg"
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
        print(file)


if __name__ == "__main__":
    main()
