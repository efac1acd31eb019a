"""Token-to-token influence and layer-by-head maps, from the attention rows that the layers really compute."""

from dataclasses import dataclass, field

import torch

from .coloured_text import require_figure
from .family_rows import AttentionRows, attention_rows, rollout
from .reading import ReadText, read_text


@dataclass(frozen=True)
class Influence:
    """How much each token (columns) acts on each token (rows) of one text.

    matrix: (n, n), rows sum to 1. method: "rollout" or "plain".
    """

    read: ReadText = field(repr=False)
    matrix: torch.Tensor = field(repr=False)
    method: str

    @property
    def tokens(self) -> list[str]:
        """The tokens as readable words."""
        return self.read.names

    def on(self, token: int, n: int = 5) -> list[tuple[str, float, int]]:
        """The n tokens that act most on one: (token, share, position)."""
        if not -len(self.tokens) <= token < len(self.tokens):
            raise ValueError(f"`token` is {token}, but the text has {len(self.tokens)} tokens")
        shares, places = self.matrix[token].topk(min(n, len(self.tokens)))
        return [(self.tokens[i], share, i) for share, i in zip(shares.tolist(), places.tolist())]

    def draw(self):
        """The matrix as a matplotlib figure; colours are square roots of shares. Tokens are named up to 60 of them."""
        figure_class = require_figure()
        count = len(self.tokens)
        side = min(10.0, 2.5 + 0.16 * count) if count <= 60 else 6.5
        figure = figure_class(figsize=(side + 1, side), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(self.matrix.sqrt().numpy(), cmap="magma", vmin=0, interpolation="nearest")
        if count <= 60:
            names = [name.replace("$", r"\$") for name in self.tokens]
            axis.set_xticks(range(count), names, rotation=90, fontsize=7)
            axis.set_yticks(range(count), names, fontsize=7)
        axis.set(xlabel="acts", ylabel="is acted on")
        axis.set_title(f"token-to-token influence ({self.method})", fontsize=9)
        figure.colorbar(image, ax=axis, shrink=0.8).set_label("square root of the share", fontsize=8)
        return figure


def influence(
    model,
    tokenizer,
    text: str,
    *,
    method: str = "rollout",
    layer: int | None = None,
    head: int | None = None,
    residual: float = 0.5,
    max_tokens: int | None = None,
) -> Influence:
    """Token-to-token influence, (n, n), from the attention rows that the layers compute (see `attention_rows`).

    Args:
        model, tokenizer, text, max_tokens: as for `importance`; up to 2048 tokens.
        method: `"rollout"`: through all layers, with `residual` for the residual stream (see `rollout`). `"plain"`: the rows
            themselves, mean over layers and heads.
        layer, head (`int`, *optional*): of `"plain"`, this layer or head alone.
        residual (`float`): of `"rollout"`, the identity's part in each layer.
    """
    if method not in ("rollout", "plain"):
        raise ValueError(f"`method` is {method!r}; the methods are ('rollout', 'plain')")
    if method == "rollout" and (layer is not None or head is not None):
        raise ValueError("rollout goes through all layers and heads: `layer` and `head` belong to method='plain'")
    read = read_text(tokenizer, text, max_tokens)
    rows = attention_rows(model, read).rows
    for name, given, size in (("layer", layer, rows.shape[0]), ("head", head, rows.shape[1])):
        if given is not None and not 0 <= given < size:
            raise ValueError(f"`{name}` is {given}, expected 0 to {size - 1}")
    if method == "rollout":
        return Influence(read, rollout(rows, residual), method)
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    heads = slice(None) if head is None else slice(head, head + 1)
    return Influence(read, rows[layers, heads].mean((0, 1)), method)


@dataclass(frozen=True)
class LayerHeadMaps:
    """The attention rows of every layer and head of one text, (L, H, n, n), to be drawn. See `attention_rows`."""

    read: ReadText = field(repr=False)
    found: AttentionRows = field(repr=False)

    @property
    def rows(self) -> torch.Tensor:
        """(L, H, n, n), rows sum to 1."""
        return self.found.rows

    def draw(self, layers=None, heads=None):
        """A matplotlib figure: a row of maps for each layer, a column for each head. DANet's negative scores are blue."""
        figure_class = require_figure()
        count, number = self.rows.shape[:2]
        layers = list(range(count)) if layers is None else list(layers)
        heads = list(range(number)) if heads is None else list(heads)
        wrong = [i for i in layers if not 0 <= i < count] + [i for i in heads if not 0 <= i < number]
        if wrong or not layers or not heads:
            raise ValueError(
                f"there are layers 0 to {count - 1} and heads 0 to {number - 1}, asked for {layers}, {heads}"
            )
        figure = figure_class(figsize=(1.9 * len(heads) + 0.8, 1.9 * len(layers) + 0.4), layout="constrained")
        axes = figure.subplots(len(layers), len(heads), squeeze=False)
        signed = self.found.signed is not None
        shown = self.rows[layers][:, heads].sqrt()
        high = float(torch.quantile(shown.flatten()[:: max(1, shown.numel() // 100_000)], 0.995))  # a sample will do
        options = {"cmap": "RdBu_r" if signed else "magma", "vmin": -high if signed else 0, "vmax": high}
        if signed:
            shown = shown * self.found.signed[layers][:, heads].sign()
        for line, layer, maps in zip(axes, layers, shown):
            for axis, head, values in zip(line, heads, maps):
                image = axis.imshow(values.numpy(), interpolation="nearest", **options)
                axis.set_title(f"layer {layer}, head {head}", fontsize=7)
                axis.set(xticks=[], yticks=[])
        label = "square root of the share" + (", with the score's sign" if signed else "")
        figure.colorbar(image, ax=axes, shrink=0.7).set_label(label, fontsize=7)
        return figure


def attention_maps(model, tokenizer, text: str, max_tokens: int | None = None) -> LayerHeadMaps:
    """The real attention rows of every layer and head (see `attention_rows`): up to 2048 tokens."""
    read = read_text(tokenizer, text, max_tokens)
    return LayerHeadMaps(read, attention_rows(model, read))
