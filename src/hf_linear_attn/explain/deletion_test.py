"""Whether an explanation is true of the model: without the tokens that it calls important, the prediction should change
more than without as many random ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .family_rows import reads_from_the_left
from .reading import ReadText, evaluating
from .token_importance import importance


@dataclass(frozen=True)
class Faithfulness:
    """What deleting tokens did to the predictions for a number of texts.

    The change of a prediction is the total variation distance of its probabilities before and after, 0 to 1.

    method: of the importance. share: of the tokens that were deleted. top, random, bottom: mean change without the most
    important tokens, without random ones (mean of `draws` draws a text), without the least important. flips_top,
    flips_random: share of texts whose likeliest answer changed. wins: share of texts that lost more by their top tokens
    than by random ones (ties count half). texts: how many. top_of_text, random_of_text: the changes behind the means.
    """

    method: str
    share: float
    draws: int
    texts: int
    top: float
    random: float
    bottom: float
    flips_top: float
    flips_random: float
    wins: float
    top_of_text: list[float]
    random_of_text: list[float]

    @property
    def ratio(self) -> float:
        """How many times more the top tokens change the prediction than random ones do."""
        return self.top / max(self.random, 1e-12)

    def interval(self, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """95 % interval of the mean difference top - random, by bootstrap over the texts."""
        differences = torch.tensor(self.top_of_text) - torch.tensor(self.random_of_text)
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(differences), (draws, len(differences)), generator=generator)
        low, high = differences[picks].mean(-1).quantile(torch.tensor([0.025, 0.975])).tolist()
        return low, high


def faithfulness(
    model,
    tokenizer,
    texts: Sequence[str],
    *,
    method: str = "auto",
    share: float = 0.2,
    draws: int = 8,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Faithfulness:
    """Delete the most important tokens of each text, as many random ones, and the least important; compare predictions.

    Deleted tokens are taken out of the row, so that what follows moves up. Special tokens and, in a causal model, the last
    token (which the prediction is read from) always stay. Costs draws + 3 runs a text, and one for the importance.

    Args:
        model: a classifier of texts, or a causal language model (its prediction is the token after the text).
        tokenizer, method, max_tokens: as for `importance`.
        texts: a list of strings; 30 or more give a useful interval.
        share (`float`): of the deletable tokens that are deleted, at least one.
        draws (`int`): random deletions a text.
        seed (`int`): of the draws.

    Raises:
        ValueError: no text, a model without a prediction for a whole text, a share that is not between 0 and 1.
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError("`texts` must be a list of at least one string")
    if not 0 < share < 1:
        raise ValueError(f"`share` must be between 0 and 1, got {share}")
    if draws < 1:
        raise ValueError(f"`draws` must be at least 1, got {draws}")
    generator = torch.Generator().manual_seed(seed)
    top, rand, bottom, flips_top, flips_random = [], [], [], [], []
    for text in texts:
        found = importance(model, tokenizer, text, method=method, max_tokens=max_tokens)
        free = _deletable(model, found.read)
        count = max(1, round(share * len(free)))
        if len(free) <= count:
            raise ValueError(f"the text has {len(free)} tokens that may be deleted, too few to compare: {text[:40]!r}")
        order = free[found.scores[free].argsort(descending=True, stable=True)]
        draw = [free[torch.randperm(len(free), generator=generator)[:count]] for _ in range(draws)]
        probabilities = _predictions(model, found.read, [order[:0], order[:count], order[-count:], *draw])
        changes = (probabilities - probabilities[0]).abs().sum(-1) / 2
        flips = probabilities.argmax(-1) != probabilities[0].argmax()
        top.append(float(changes[1]))
        bottom.append(float(changes[2]))
        rand.append(float(changes[3:].mean()))
        flips_top.append(float(flips[1]))
        flips_random.append(float(flips[3:].float().mean()))
    pairs = list(zip(top, rand))
    return Faithfulness(
        method=found.method,
        share=share,
        draws=draws,
        texts=len(top),
        top=_mean(top),
        random=_mean(rand),
        bottom=_mean(bottom),
        flips_top=_mean(flips_top),
        flips_random=_mean(flips_random),
        wins=_mean([float(a > b) + 0.5 * (a == b) for a, b in pairs]),
        top_of_text=top,
        random_of_text=rand,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _deletable(model, read: ReadText) -> torch.Tensor:
    """Positions that may be deleted."""
    free = ~read.special
    if reads_from_the_left(model):
        free = free.clone()
        free[-1] = False
    return free.nonzero()[:, 0]


def _predictions(model, read: ReadText, deletions: list[torch.Tensor]) -> torch.Tensor:
    """Probabilities (deletions, classes) of the text without some tokens. Rows of one length run together."""
    found: list[torch.Tensor] = []
    device = next(model.parameters()).device
    with evaluating(model):
        for same_length in (deletions[:1], deletions[1:]):
            keep = []
            for positions in same_length:
                stays = torch.ones(len(read), dtype=torch.bool)
                stays[positions] = False
                keep.append(stays.nonzero()[:, 0])
            ids = torch.stack([read.ids[kept] for kept in keep]).to(device)
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            logits = output.get("logits")
            if logits is None:
                raise ValueError(
                    f"{type(model).__name__} predicts nothing: give a classifier or a causal language model"
                )
            if logits.dim() == 3:
                if not reads_from_the_left(model) or getattr(model, "lm_head", None) is None:
                    raise ValueError(
                        f"{type(model).__name__} predicts something for each token, not for the text: give a classifier of "
                        "texts or a causal language model"
                    )
                logits = logits[:, -1]
            found.append(logits.float().softmax(-1).cpu())
    return torch.cat(found)
