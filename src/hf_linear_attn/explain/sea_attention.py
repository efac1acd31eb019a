"""Teacher, estimate, mask and student attention of a SEA layer, side by side.

from hf_linear_attn.explain.sea_attention import draw_attention

figure = draw_attention(student, tokenizer("The people of the United States", return_tensors="pt"), teacher,
tokens=...) figure.savefig("attention.png")
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..modeling.sea.cells import key_to_cell
from ..modeling.sea.losses import TeacherTargets
from ..training.sea_distillation import record_targets, sea_model

LARGEST_TEXT = 2048  # pictures are T x T: longer texts are refused rather than drawn as noise
TITLES = {
    "teacher": "teacher",
    "estimate": "estimate, grown to the keys",
    "mask": "kept keys",
    "student": "student",
}


@torch.no_grad()
def attention_panels(
    student, inputs: dict[str, Any], teacher=None, layer: int = 0, sample: int = 0
) -> dict[str, torch.Tensor]:
    """What a SEA layer saw in one text: `teacher`, `estimate`, `mask`, `student`, each (H, n, n) over its n real
    tokens.

    Rows are queries, columns keys. `teacher` is its softmax attention and present only if a teacher is given;
    `estimate` the compressed attention repeated for the keys of each cell and normalised; `student` its sparse
    attention, normalised.

    Raises:
        ValueError: a layer that is no SEA layer, a text that is too long to be drawn.
    """
    model = sea_model(student)
    layers = sorted(model.sea_layers())
    if layer not in layers:
        raise ValueError(f"layer {layer} is no SEA layer; SEA layers of this model: {layers}")
    ids = inputs["input_ids"]
    if ids.shape[1] > LARGEST_TEXT:
        raise ValueError(f"the text has {ids.shape[1]} tokens; pictures of T x T are made for up to {LARGEST_TEXT}")
    training = model.training
    model.eval()
    output = model(**inputs, output_attentions=True, output_sea=True)
    model.train(training)
    mask = inputs.get("attention_mask")
    real = torch.arange(ids.shape[1]) if mask is None else mask[sample].bool().nonzero()[:, 0].cpu()
    count = len(real)

    def square(x: torch.Tensor) -> torch.Tensor:  # (B, H, T, S) -> (H, n, n)
        return x[sample].detach().float().cpu()[:, real][:, :, real]

    visible = torch.arange(1, count + 1) if model.config.is_causal else torch.full((count,), count)
    seen = torch.arange(count) < visible[:, None]
    probs = output["estimated_attentions"][layer][sample].detach().float().cpu()[:, real]  # (H, n, M)
    cell = key_to_cell(torch.arange(count), visible[:, None], probs.shape[-1])
    estimate = probs.gather(-1, cell.expand(probs.shape[0], -1, -1)).masked_fill(~seen, 0.0)
    student_attention = square(output["attentions"][layer])
    panels = {
        "estimate": estimate / estimate.sum(-1, keepdim=True).clamp_min(1e-12),
        "mask": square(output["kept_keys"][layer]),
        "student": student_attention / student_attention.sum(-1, keepdim=True).clamp_min(1e-12),
    }
    if teacher is None:
        return panels
    targets: TeacherTargets = record_targets(teacher, inputs)[0][layer]
    scores = square(targets.rows(torch.arange(ids.shape[1], device=ids.device)))
    return {"teacher": scores.masked_fill(~seen, float("-inf")).softmax(-1)} | panels


def draw_attention(
    student,
    inputs: dict[str, Any],
    teacher=None,
    *,
    layer: int = 0,
    heads: Sequence[int] = (0,),
    sample: int = 0,
    tokens: Sequence[str] | None = None,
):
    """A matplotlib figure of `attention_panels`: one row a head, one column a panel; colours are roots of
    probabilities.

    tokens (*optional*): labels of the text's real tokens, shown where there are at most 40.

    Raises:
        ValueError: a head or layer that does not exist, labels of another number than the tokens.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'hf-linear-attn[train]'") from error
    panels = attention_panels(student, inputs, teacher, layer, sample)
    number, count = panels["mask"].shape[:2]
    wrong = [head for head in heads if not 0 <= head < number]
    if wrong:
        raise ValueError(f"heads {wrong} do not exist: this layer has heads 0 to {number - 1}")
    if tokens is not None and len(tokens) != count:
        raise ValueError(f"`tokens` has {len(tokens)} labels, but the text has {count} real tokens")
    figure = Figure(figsize=(3.2 * len(panels), 3.2 * len(heads)), layout="constrained")
    axes = figure.subplots(len(heads), len(panels), squeeze=False)
    for row, head in zip(axes, heads):
        for axis, (name, values) in zip(row, panels.items()):
            axis.imshow(values[head].sqrt().numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"{TITLES[name]} (head {head})", fontsize=8)
            axis.tick_params(labelsize=6)
            if tokens is not None and count <= 40:
                axis.set_xticks(range(count), tokens, rotation=90)
                axis.set_yticks(range(count), tokens)
        row[0].set_ylabel("query", fontsize=7)
    figure.suptitle(f"layer {layer}, k = {sea_model(student).config.k}", fontsize=9)
    return figure


__all__ = ["attention_panels", "draw_attention"]
