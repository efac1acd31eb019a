"""Which tokens of a text count for a model.

from hf_linear_attn.explain import importance

found = importance(model, tokenizer, "The state of the Union is strong.")
print(found.to_terminal())
found.top(5)
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..modeling.danet.modeling_danet import DanetPreTrainedModel
from ..modeling.fastformer.modeling_fastformer import FastformerModel
from ..modeling.leap.modeling_leap import LeapModel
from ..modeling.sea.modeling_sea import SeaPreTrainedModel
from ..modeling.shared.files.whole_files import write_whole
from . import coloured_text
from .family_rows import AttentionRows, attention_rows, find_part, reads_from_the_left, rollout
from .reading import ReadText, evaluating, on_device_of, read_text

METHODS = ("auto", "focus", "received", "rollout")
CAPTIONS = {
    "focus": "focus weight; 1 is the average token of the text",
    "received": "attention received; 1 is an equal share for all tokens in sight",
    "rollout": "influence on what the prediction reads; 1 is an equal share for all tokens",
}


@dataclass(frozen=True)
class Importance:
    """How much each of a text's n tokens counts.

    scores: (n,) float32, where 1 is the average (see `importance`). layers: the same by layer and head, (L, H, n);
    None for "rollout", which mixes the layers. method: "focus", "received" or "rollout".
    """

    read: ReadText = field(repr=False)
    scores: torch.Tensor
    layers: torch.Tensor | None = field(repr=False)
    method: str
    model_name: str

    @property
    def tokens(self) -> list[str]:
        """The tokens as readable words."""
        return self.read.names

    @property
    def title(self) -> str:
        """One line above the map."""
        return f"What {self.model_name} looks at: {len(self.tokens)} tokens"

    @property
    def special_share(self) -> float:
        """What the special tokens have of the sum of all scores: 0 to 1."""
        return float(self.scores[self.read.special].sum() / self.scores.sum().clamp(min=1e-9))

    def top(self, n: int = 10) -> list[tuple[str, float, int]]:
        """The n tokens that count most: (token, score, position), the first the highest. Special tokens are left out."""
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n}")
        order = self.scores.masked_fill(self.read.special, float("-inf")).argsort(descending=True, stable=True)
        highest = order[: min(n, int((~self.read.special).sum()))].tolist()
        return [(self.tokens[i], float(self.scores[i]), i) for i in highest]

    def to_html(self, page: bool = True) -> str:
        """The text with its tokens coloured, and the scale: a page of its own, or the box alone with `page=False`."""
        box = coloured_text.to_html(self.read, self.scores, self.title, CAPTIONS[self.method])
        return coloured_text.to_page(box, self.title) if page else box

    def save_html(self, path: str | Path) -> Path:
        """Write the page; folders are made. Returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda part: part.write_text(self.to_html(), encoding="utf-8"))
        return path

    def to_terminal(self, width: int = 100, color: bool = True) -> str:
        """The text with ANSI colours, in lines of `width`; without `color` the top fifth stands in [brackets]."""
        if width < 24:
            raise ValueError(f"`width` must be at least 24 columns, got {width}")
        return coloured_text.to_terminal(self.read, self.scores, CAPTIONS[self.method], width, color)

    def draw(self, columns: int = 88):
        """The coloured text as a matplotlib figure."""
        return coloured_text.draw(self.read, self.scores, self.title, CAPTIONS[self.method], columns)

    def draw_layers(self):
        """A matplotlib figure of every layer and head (a row each) over the tokens (columns)."""
        if self.layers is None:
            raise ValueError("rollout mixes the layers: draw them with method='focus' or 'received'")
        figure_class = coloured_text.require_figure()
        count, heads, tokens = self.layers.shape
        named = tokens <= 60
        figure = figure_class(figsize=(min(14, 3 + 0.22 * tokens), 1.6 + 0.24 * count * heads), layout="constrained")
        axis = figure.subplots()
        high = max(2.0, float(torch.quantile(self.layers, 0.99)))
        image = axis.imshow(self.layers.flatten(0, 1).numpy(), aspect="auto", cmap="Oranges", vmin=0, vmax=high)
        labels = [f"layer {layer} head {head}" for layer in range(count) for head in range(heads)]
        axis.set_yticks(range(count * heads), labels, fontsize=7)
        for layer in range(1, count):
            axis.axhline(layer * heads - 0.5, color="black", linewidth=0.6)
        if named:
            axis.set_xticks(range(tokens), [name.replace("$", r"\$") for name in self.tokens], rotation=90, fontsize=7)
        else:
            axis.set_xlabel("token")
        axis.set_title(self.title, fontsize=9)
        figure.colorbar(image, ax=axis, pad=0.01).set_label(CAPTIONS[self.method].replace("; ", "\n"), fontsize=7)
        return figure

    def _repr_html_(self) -> str:
        return self.to_html(page=False)


def importance(model, tokenizer, text: str, *, method: str = "auto", max_tokens: int | None = None) -> Importance:
    """How much each token of a text counts for a model.

    Args:
        model: any model of this package, with or without PEFT adapters; for "received" and "rollout" also Transformers'
            own with `attn_implementation="eager"`.
        tokenizer: the model's.
        text (`str`): what is explained.
        method: `"focus"` (LEAP, Fastformer; linear in the length): the focus weights, as a share of their sum over the
            text, mean over heads and the layers that have some. `"received"` (every family): what queries give a token, relative
            to an equal share for all they could see, mean over queries, layers and heads. `"rollout"` (every family): attention
            rollout, read where the prediction is read (`reading_token`). `"auto"`: focus where it is defined, received for
            DANet, else rollout: what deleting tokens from trained models speaks for (docs, results).
        max_tokens (`int`, *optional*): look at the first tokens only.

    Returns:
        [`Importance`].

    Raises:
        ValueError: an unknown method, a method that the family does not define, a text that is too long for maps.
    """
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}; the methods are {METHODS}")
    body = find_part(model, (LeapModel, FastformerModel))
    if method == "auto":
        danet = find_part(model, DanetPreTrainedModel) is not None
        method = "focus" if body is not None else "received" if danet else "rollout"
    read = read_text(tokenizer, text, max_tokens)
    name = f"{model.config.model_type} ({type(model).__name__})"
    if method == "focus":
        if body is None:
            raise ValueError(
                f"{model.config.model_type} has no focus weights, only LEAP and Fastformer do: use method='received' or "
                "'rollout'"
            )
        layers = _focus_shares(body, read)
        return Importance(read, layers.mean((0, 1)), layers, method, name)
    found = attention_rows(model, read)
    if method == "received":
        layers = received(found)
        return Importance(read, layers.mean((0, 1)), layers, method, name)
    reader = reading_token(model, read)
    flow = rollout(found.rows)
    scores = (flow.mean(0) if reader is None else flow[reader]) * len(read)
    return Importance(read, scores, None, method, name)


def received(found: AttentionRows) -> torch.Tensor:
    """What queries give a token, relative to an equal share for all tokens in sight, mean over queries: (L, H, n)."""
    choices = found.visible.sum(-1, keepdim=True)  # (L, H, n, 1)
    relative = found.rows * choices
    return relative.sum(-2) / found.visible.sum(-2).clamp_min(1)


def _focus_shares(body, read: ReadText) -> torch.Tensor:
    """Focus weights as multiples of the text's average one, (L, H, n)."""
    inputs: dict[str, Any] = {
        name: read.inputs[name] for name in ("input_ids", "attention_mask") if name in read.inputs
    }
    with evaluating(body):
        output = body(**on_device_of(body, inputs), output_focus_weights="log")
    found = [layer[0].float().cpu() for layer in output.focus_weights if layer is not None]
    if not found:
        raise ValueError(
            "all layers of this LEAP are softmax attention, which has no focus weights: use method='received'"
        )
    logs = torch.stack(found)
    # Weights of an exp focus may be beyond any number; a text whose weights are all 0 shares evenly.
    return logs.clamp_min(torch.finfo(torch.float32).min).softmax(-1) * logs.shape[-1]


def reading_token(model, read: ReadText) -> int | None:
    """The token that a model's prediction for a whole text is read from: its index, or None for all tokens alike.

    The last token of models that read from the left; the first of a BERT classifier and where DANet pools so.
    """
    pooler = getattr(model.config, "pooler", None)
    if pooler in ("first", "last"):
        return 0 if pooler == "first" else len(read) - 1
    if reads_from_the_left(model):
        return len(read) - 1
    sea = find_part(model, SeaPreTrainedModel)
    host = model.config.model_type if sea is None else sea.config.host_config.model_type
    return 0 if host == "bert" and "SequenceClassification" in type(model).__name__ else None
