"""How far back a model looks, by its attention rows and by what its predictions lose without the rest."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .family_rows import attention_rows, reads_from_the_left, rollout
from .reading import evaluating, read_text


@dataclass(frozen=True)
class EffectiveContext:
    """How far from a token lie the tokens that hold `share` of its attention. Medians over the second half of the text.

    heads: (L, H) tokens. model: the same of the rollout through all layers. uniform: of equal attention to all tokens in
    sight, for comparison. negative_share: (L, H), how much of it has a negative sign (DANet; else 0).
    """

    share: float
    length: int
    heads: torch.Tensor
    model: float
    uniform: float
    negative_share: torch.Tensor

    def table(self) -> str:
        """A line for each layer, then the model's."""
        lines = [f"tokens that hold {self.share:.0%} of the attention, of {self.length}"]
        for index, layer in enumerate(self.heads.tolist()):
            lines.append(f"layer {index:2}  " + "  ".join(f"{value:6.0f}" for value in layer))
        lines.append(
            f"through all layers (rollout) {self.model:.0f}; equal shares for all tokens would be {self.uniform:.0f}"
        )
        return "\n".join(lines)


def effective_context(
    model, tokenizer, text: str, *, share: float = 0.9, max_tokens: int | None = None
) -> EffectiveContext:
    """The effective context length: the smallest distance d with which the tokens at most d - 1 places away from a token
    (before it, or on both sides in an encoder) hold `share` of its attention row. 1 is the token itself.

    Only the second half of the text's tokens ask, which have at least n / 2 tokens to choose from.
    """
    if not 0 < share < 1:
        raise ValueError(f"`share` must be between 0 and 1, got {share}")
    found = attention_rows(model, read_text(tokenizer, text, max_tokens))
    count = found.rows.shape[-1]
    flat = torch.ones(count, count)
    flat = flat.tril() if found.causal else flat
    return EffectiveContext(
        share,
        count,
        _reach(found.rows, share),
        float(_reach(rollout(found.rows), share)),
        float(_reach(flat / flat.sum(-1, keepdim=True), share)),
        found.negative_share,
    )


def _reach(rows: torch.Tensor, share: float) -> torch.Tensor:
    """Distance that holds `share` of rows (..., n, n): median over the second half of the queries, shape (...)."""
    count = rows.shape[-1]
    first = count // 2
    queries = torch.arange(first, count)
    distance = (queries[:, None] - torch.arange(count)).abs().expand_as(rows[..., first:, :])
    mass = torch.zeros(*rows.shape[:-2], count - first, count).scatter_add_(-1, distance, rows[..., first:, :])
    covered = mass.cumsum(-1) >= share * mass.sum(-1, keepdim=True) - 1e-6
    return (covered.int().argmax(-1) + 1).float().median(-1).values


@dataclass(frozen=True)
class ContextLosses:
    """A language model's loss on the same targets, seeing only the last c tokens before each.

    contexts: tokens seen. losses: mean negative log likelihood in nats. targets: how many tokens were predicted.
    """

    contexts: list[int]
    losses: list[float]
    targets: int

    def effective(self, tolerance: float = 0.01) -> int:
        """The smallest context whose loss is within `tolerance` (a share) of the lowest: the context that is used."""
        bound = min(self.losses) * (1 + tolerance)
        return next(context for context, loss in zip(self.contexts, self.losses) if loss <= bound)


def context_losses(
    model, tokenizer, text: str, contexts=(1, 2, 4, 8, 16, 32, 64, 128), *, targets: int = 64, batch_size: int = 16
) -> ContextLosses:
    """The effective context of a causal language model by what it does: its loss with ever longer contexts.

    `targets` tokens are drawn at equal distances from those that have the longest context before them; O(contexts x
    targets x c) tokens are run.

    Raises:
        ValueError: a model without next-token predictions, a text that is shorter than the longest context.
    """
    if not reads_from_the_left(model) or getattr(model, "lm_head", None) is None:
        raise ValueError(f"{type(model).__name__} does not predict next tokens: give a causal language model")
    contexts = sorted(set(contexts))
    ids = read_text(tokenizer, text).ids
    longest = contexts[-1]
    if contexts[0] < 1 or len(ids) <= longest:
        raise ValueError(
            f"`contexts` go from {contexts[0]} to {longest} tokens; the text has {len(ids)}, one must be left"
        )
    places = torch.linspace(longest, len(ids) - 1, min(targets, len(ids) - longest)).round().long()
    device = next(model.parameters()).device
    losses = []
    with evaluating(model):
        for context in contexts:
            rows = ids[places[:, None] - context + torch.arange(context)].split(batch_size)
            logits = torch.cat([model(row.to(device), use_cache=False).logits[:, -1].float().cpu() for row in rows])
            losses.append(float(F.cross_entropy(logits, ids[places])))
    return ContextLosses(contexts, losses, len(places))
