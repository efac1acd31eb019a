"""A text as a model reads it: its tokens, and the characters that each of them stands for."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ReadText:
    """A tokenized text of n tokens.

    text: what is shown. inputs: what the model takes, each of shape (1, n). spans: for each token its first character
    in `text` and the one after its last; empty for tokens that stand for no character (special ones, and the later
    tokens of a character that several tokens spell). names: the tokens as readable words. special: bool (n,).
    """

    text: str
    inputs: dict[str, torch.Tensor]
    spans: list[tuple[int, int]]
    names: list[str]
    special: torch.Tensor

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def ids(self) -> torch.Tensor:
        """Token ids (n,)."""
        return self.inputs["input_ids"][0]


def read_text(tokenizer, text: str, max_tokens: int | None = None) -> ReadText:
    """Tokenize one text and find the characters of each token. Longer texts are cut after `max_tokens` tokens.

    Raises:
        ValueError: a text without a token, or something else than one text.
    """
    if not isinstance(text, str):
        raise ValueError(f"`text` must be one string, got {type(text).__name__}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"`max_tokens` must be at least 1, got {max_tokens}")
    fast = bool(getattr(tokenizer, "is_fast", False))
    cut = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens, "truncation_side": "right"}
    encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=fast, verbose=False, **cut)
    ids = encoded["input_ids"][0].tolist()
    if not ids:
        raise ValueError(f"`text` has no token: {text[:40]!r}")
    if fast:
        spans = _without_overlaps(encoded.pop("offset_mapping")[0].tolist())
        text = text[: max(end for _, end in spans)] if cut else text
    else:  # a tokenizer without offsets: its own text for each token, one after the other
        words = [tokenizer.decode([token]) for token in ids]
        ends = torch.tensor([len(word) for word in words]).cumsum(0).tolist()
        spans, text = list(zip([0, *ends[:-1]], ends)), "".join(words)
    special_ids = set(tokenizer.all_special_ids)
    special = torch.tensor([token in special_ids for token in ids])
    names = [
        tokenizer.convert_ids_to_tokens(token) if is_special else (text[start:end] or tokenizer.decode([token])).strip()
        for token, is_special, (start, end) in zip(ids, special.tolist(), spans)
    ]
    return ReadText(text, dict(encoded), spans, [name or "␣" for name in names], special)


def _without_overlaps(spans: list[list[int]]) -> list[tuple[int, int]]:
    """Each character belongs to the first token that covers it: bytes of one letter come as tokens of the same span."""
    reached, kept = 0, []
    for start, end in spans:
        start = max(start, reached) if end > start else reached
        end = max(start, end) if end > start else start
        reached = max(reached, end)
        kept.append((start, end))
    return kept


@contextlib.contextmanager
def evaluating(model):
    """No dropout and no gradients while the context is open."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def on_device_of(model, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs beside the model's parameters."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}
