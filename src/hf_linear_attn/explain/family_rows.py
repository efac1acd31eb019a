"""The attention rows that a family's layers really compute, made comparable: one distribution a query.

Where a row's numbers come from:

    LEAP        focus weights over the window, divided by their sum: the means that queries gate
    Fastformer  weights of the second pooling (of keys times pooled queries), over the window or the whole text
    Hedgehog    softmax over the window and features of everything older, under their one normaliser
    SEA         sparse attention after top-k; its average term, which is no token's, is left out
    DANet       |q_i . k_j| divided by the row's sum: scores there are signed and have no normaliser, so a row says how
                strongly a token acts, not in which direction; `signed` keeps the raw scores
    others      softmax attention (`attn_implementation="eager"`): a teacher or a baseline beside ours
"""

from dataclasses import dataclass

import torch

from ..modeling.danet.modeling_danet import DanetPreTrainedModel
from ..modeling.fastformer.modeling_fastformer import FastformerModel
from ..modeling.hedgehog.modeling_hedgehog import HedgehogPreTrainedModel
from ..modeling.leap.modeling_leap import LeapModel
from ..modeling.sea.modeling_sea import SeaPreTrainedModel
from ..modeling.shared.configuration import layer_kind
from .reading import ReadText, evaluating, on_device_of

LONGEST_MAP = 2048  # maps are n x n a head: longer texts are refused rather than run out of memory


@dataclass(frozen=True)
class AttentionRows:
    """Rows of L layers and H heads over the n tokens of one text.

    rows: (L, H, n, n) float32, queries by keys, not negative; a row sums to 1, or to 0 where a query kept no key.
    visible: bool, the same shape: which keys a query could have chosen among. causal: whether none is later.
    signed: DANet's raw scores, else None.
    """

    rows: torch.Tensor
    visible: torch.Tensor
    causal: bool
    signed: torch.Tensor | None = None

    @property
    def negative_share(self) -> torch.Tensor:
        """Share of each head's influence that has a negative sign, (L, H); 0 where rows are not signed."""
        if self.signed is None:
            return torch.zeros(self.rows.shape[:2])
        return (self.rows * (self.signed < 0)).sum((-1, -2)) / self.rows.sum((-1, -2)).clamp_min(1e-12)


def find_part(model, kind):
    """The first module of a class inside a model and its wrappers (PEFT), or None."""
    return next((module for module in model.modules() if isinstance(module, kind)), None)


def reads_from_the_left(model) -> bool:
    """Whether tokens see only earlier ones."""
    for kind in (SeaPreTrainedModel, DanetPreTrainedModel, FastformerModel):
        part = find_part(model, kind)
        if part is not None:
            return bool(part.config.is_causal)
    if find_part(model, (LeapModel, HedgehogPreTrainedModel)) is not None:
        return True
    config = model.config
    decoders = ("gpt", "llama", "opt", "mistral", "qwen")
    return bool(getattr(config, "is_decoder", False)) or config.model_type.startswith(decoders)


def attention_rows(model, read: ReadText) -> AttentionRows:
    """Run a model on one text and return its attention rows. O(n^2) memory a head.

    Raises:
        ValueError: a text of more than 2048 tokens; a model that gives no attention (sdpa, flash: they never build it).
    """
    count = len(read)
    if count > LONGEST_MAP:
        raise ValueError(
            f"the text has {count} tokens, and maps of n x n are made for up to {LONGEST_MAP}: shorten it, give "
            "`max_tokens`, or use importance(..., method='focus'), which needs no map"
        )
    with evaluating(model):
        output = model(**on_device_of(model, read.inputs), output_attentions=True)
    maps = output.get("attentions")
    wanted = model.config.get_text_config().num_hidden_layers
    if not maps or len(maps) != wanted or any(layer is None for layer in maps):
        raise ValueError(
            f"{type(model).__name__} gave {len(maps or [])} attention maps for {wanted} layers: softmax layers build them "
            'only after model.set_attn_implementation("eager"), and layers without attention have none'
        )
    heads = {layer.shape[1] for layer in maps}
    if len(heads) > 1:
        raise ValueError(
            f"layers have different numbers of heads ({sorted(heads)}), so that there is no layer-by-head map: "
            "use `output_attentions=True` and look at each layer's own"
        )
    raw = torch.stack([layer[0].detach().float().cpu() for layer in maps])  # (L, H, n, n)
    causal = reads_from_the_left(model)
    sizes = raw.abs()
    rows = sizes / sizes.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if find_part(model, SeaPreTrainedModel) is not None:  # which keys are kept is SEA's choice, not its field of view
        everything = torch.ones(count, count, dtype=torch.bool)
        visible = (everything.tril() if causal else everything).expand_as(rows)
    else:
        visible = _seen(model, sizes)
    signed = raw if find_part(model, DanetPreTrainedModel) is not None else None
    return AttentionRows(rows, visible, causal, signed)


def _seen(model, sizes: torch.Tensor) -> torch.Tensor:
    """Which keys a query could have chosen among, (L, H, n, n), from the sizes of the rows: what is not 0.

    A weight may be too small for a number beside a large one: where layers say what they see, that counts.
    """
    body = find_part(model, (LeapModel, FastformerModel))
    if body is None:
        return sizes > 0
    seen = torch.ones_like(sizes, dtype=torch.bool)
    if isinstance(body, FastformerModel) and not body.is_causal:
        return seen
    for layer, entry in zip(seen, body.config.layer_windows):
        layer.tril_()
        window = layer_kind(entry).window
        if window is not None:
            layer.triu_(1 - window)
    return seen


def rollout(rows: torch.Tensor, residual: float = 0.5) -> torch.Tensor:
    """Attention rollout (Abnar & Zuidema 2020): how layers (L, H, n, n) pass tokens on to the last layer, (n, n).

    A layer's heads are averaged and mixed with `residual` parts of the identity, which stands for the residual stream;
    the layers are multiplied. Rows sum to 1. An estimate: what feed-forward layers and gates do is left out.
    """
    if not 0 <= residual <= 1:
        raise ValueError(f"`residual` must be between 0 and 1, got {residual}")
    identity = torch.eye(rows.shape[-1], dtype=rows.dtype)
    flow = identity
    for layer in rows.mean(1):
        step = residual * identity + (1 - residual) * layer
        flow = step / step.sum(-1, keepdim=True).clamp_min(1e-12) @ flow
    return flow
