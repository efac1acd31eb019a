"""LEAP's alignment: how much each token takes of what it sees."""

import torch

from ..modeling.leap.formula import averaged, focus_weights
from ..modeling.leap.modeling_leap import LeapAttention, LeapModel
from ..modeling.shared.call import Call
from ..modeling.shared.precision import accumulation_dtype
from ..modeling.shared.windowed_mean import windowed_mean
from .family_rows import find_part
from .reading import ReadText, evaluating, on_device_of, read_text


def alignments(model, tokenizer, text: str, max_tokens: int | None = None) -> tuple[ReadText, torch.Tensor]:
    """LEAP's alignment g = sigmoid(<q, K> / sqrt(E)): how much each token takes of what it sees, (L, H, n) in 0 to 1.

    The focus weight says how much a token counts for others, the alignment how much others count for it. O(n).

    Raises:
        ValueError: a model that is no LEAP, or one with softmax layers, which have no alignment.
    """
    body = find_part(model, LeapModel)
    if body is None:
        raise ValueError(f"only LEAP has alignments, and this is a {model.config.model_type}")
    softmax = [i for i, kind in enumerate(body.config.layer_kinds) if kind.name == "softmax"]
    if softmax:
        raise ValueError(f"layers {softmax} of this LEAP are softmax attention, which has no alignment")
    read = read_text(tokenizer, text, max_tokens)
    gates: dict[int, torch.Tensor] = {}

    def keep(layer: LeapAttention, positional, keywords):
        gates[layer.layer_idx] = _alignment(layer, positional[0], keywords["call"])

    hooks = [layer.attention.register_forward_pre_hook(keep, with_kwargs=True) for layer in body.layers]
    try:
        with evaluating(body):
            body(**on_device_of(body, {"input_ids": read.inputs["input_ids"]}), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return read, torch.stack([gates[index] for index in sorted(gates)])


def _alignment(layer: LeapAttention, hidden_states: torch.Tensor, call: Call) -> torch.Tensor:
    """(1, n, d) -> (H, n); the text is one document without padding."""
    projected = layer.qfkv_proj(layer.convolved(hidden_states, call)).unflatten(
        -1, (4, layer.num_heads, layer.head_dim)
    )
    rotated = layer.rotated(projected, call)
    weights = focus_weights(projected[:, :, 1], projected[:, :, 2], layer.exponential)
    key = averaged(projected, rotated).to(accumulation_dtype(projected.dtype))
    means, _ = windowed_mean(key, weights, layer.window, log_weights=layer.exponential, decay=layer.decay())
    query = projected[:, :, 0] if rotated is None else rotated[0]
    gate = torch.sigmoid((query.to(key.dtype) * means[:, :, 0]).sum(-1) * layer.head_dim**-0.5)  # (1, n, H)
    return gate[0].T.float().cpu()
