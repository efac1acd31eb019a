"""generate() run twice in two ways that must agree. The checks are functions, so that controls can break the code under them."""

import torch
from transformers import set_seed

from .batches import left_padded, tokens
from .caches import is_hybrid

PROMPT = 11
NEW = 12
# generate() hands logits out in float32, whatever the model computes in.
TOLERANCE = 2e-5


def generate(model, ids=None, mask=None, seed: int = 0, new: int = NEW, **kwargs):
    """`model.generate` with every step's logits; the same seed draws the same tokens."""
    set_seed(seed)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **kwargs
    )


def assert_same_text(first, second, logits: bool = True) -> None:
    """Same tokens, and the same logits at every step."""
    assert torch.equal(first.sequences, second.sequences), "other tokens"
    if logits:
        assert len(first.logits) == len(second.logits)
        for step, (a, b) in enumerate(zip(first.logits, second.logits)):
            torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0, msg=lambda m, step=step: f"step {step}: {m}")


def texts() -> list[torch.Tensor]:
    """Three prompts of unequal length."""
    return [row[:length] for row, length in zip(tokens(3, PROMPT), (PROMPT, 6, 2))]


def check_cache(model, padded: bool = False, **kwargs) -> None:
    """With a state and without one (the whole text again at each step) the same text comes out."""
    ids, mask = left_padded(texts()) if padded else (tokens(3, PROMPT), None)
    assert_same_text(generate(model, ids, mask, **kwargs), generate(model, ids, mask, use_cache=False, **kwargs))


def check_rows_alone(model, **kwargs) -> None:
    """A left-padded batch gives each text what it gets alone."""
    ids, mask = left_padded(texts())
    together = generate(model, ids, mask, **kwargs).sequences[:, PROMPT:].unflatten(0, (len(texts()), -1))
    for rows, text in zip(together, texts()):
        alone = generate(model, text[None], **kwargs).sequences[:, len(text) :]
        assert torch.equal(rows, alone), f"the text of length {len(text)} continues otherwise in a batch"


def check_batch_operations(model) -> None:
    """Rows of a cache can be repeated and chosen, each with its own length."""
    ids, mask = left_padded(texts())
    step = tokens(3, 1, seed=1)
    chosen = torch.tensor([2, 0])
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).cache
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(2 * chosen)
        told = {}
        if is_hybrid(cache):
            told["attention_mask"] = torch.cat([mask[chosen], torch.ones(2, 1, dtype=torch.long)], 1)
        logits = model(step[chosen], cache=cache, **told).logits
        expected = [model(torch.cat([texts()[i], step[i]])[None], use_cache=False).logits[:, -1:] for i in chosen]
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-9, rtol=0)
