"""What the feature checks have in common: token batches, padded and packed ones, and one step of any model with a cache."""

import inspect

import torch
from transformers import DataCollatorWithFlattening

from .models import VOCAB, Subject


def tokens(subject: Subject, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids (batch, length) on the model's device, none of them the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator).to(subject.device)


def rows_of(subject: Subject) -> list[torch.Tensor]:
    """Three texts of unequal length."""
    return [row[:length] for row, length in zip(tokens(subject, 3, 19), (19, 11, 4), strict=True)]


def takes(model, name: str) -> bool:
    """Whether `forward` declares this argument."""
    return name in inspect.signature(model.forward).parameters


def padded(
    subject: Subject, model, rows: list[torch.Tensor], side: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The texts in one batch: ids, and the mask with the positions that `generate()` would make of it."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=subject.device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = row, 1
    more = {"attention_mask": mask}
    if takes(model, "position_ids"):
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return ids, more


def packed(subject: Subject, rows: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """The texts behind one another in one row, as Transformers' collator says where each begins."""
    features = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows]
    batch = dict(DataCollatorWithFlattening(**options)(features))
    batch.pop("labels")
    return {k: v.to(subject.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@torch.no_grad()
def logits_of(model, input_ids: torch.Tensor, **more) -> torch.Tensor:
    """Logits (batch, length, vocabulary) without a cache."""
    if takes(model, "use_cache"):
        more.setdefault("use_cache", False)
    return model(input_ids=input_ids, **more).logits


def cache_argument(model) -> str:
    """What this model calls the state of its past."""
    return next(name for name in ("cache", "cache_params", "past_key_values") if takes(model, name))


@torch.no_grad()
def step(model, ids: torch.Tensor, cache=None, **more):
    """Logits of `ids` after what the cache has seen, and the cache after them."""
    name = cache_argument(model)
    if cache is not None:
        more[name] = cache
    output = model(input_ids=ids, use_cache=True, **more)
    cache = getattr(output, name, None)
    assert cache is not None, "no cache is returned"
    return output.logits, cache


def tensors_of(thing, seen: set[int] | None = None) -> list[torch.Tensor]:
    """Every tensor that an object holds, in whatever lists, dicts and attributes."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        inside = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        inside = list(thing)
    elif type(thing).__module__.startswith(("torch", "builtins")):
        return []
    else:
        inside = [v for k, v in getattr(thing, "__dict__", {}).items() if k != "config"]
    return [tensor for each in inside for tensor in tensors_of(each, seen)]


def close(subject: Subject, found: torch.Tensor, expected: torch.Tensor) -> None:
    """The largest difference is within the subject's tolerance (and nothing is NaN)."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    difference = (found.float() - expected.float()).abs().max().item()
    assert difference <= subject.tolerance, f"differs by {difference:.2g}"
