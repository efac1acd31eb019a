"""How fast models read, train and write on this machine, side by side: they take turns, so a busy machine slows all alike."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..hub.card_facts import position_limit
from ..modeling.shared.compat import cache_keyword, cache_of
from ..modeling.shared.states.cache import RecurrentCache
from .progress import followed


def compare_speed(
    models: dict[str, Any],
    lengths: list[int],
    batch_size: int = 1,
    new_tokens: int = 32,
    rounds: int = 3,
    train: bool = True,
) -> list[dict[str, Any]]:
    """Tokens per second of each model at each length, and the bytes that it keeps of a text of that length.

    Args:
        models: title -> causal language model. Each runs on the device and in the dtype it has.
        lengths: tokens of the text that is read, trained on, and continued.
        batch_size: texts at a time.
        new_tokens: tokens written after the text, one a step.
        rounds: how often everything is measured; medians and quartiles are over these.
        train: whether to measure a training step (forward and backward) too.

    Returns:
        One row for each model, length and job ("read", "train", "write"): `tokens_per_second` (median), its quartiles, and
        `state_bytes` (a text, after reading).

    Raises:
        ValueError: a length that a model's learned positions do not allow.
    """
    for title, model in models.items():
        limit = position_limit(model.config)
        if limit is not None and max(lengths) + new_tokens > limit:
            raise ValueError(f"{title} has {limit} positions, fewer than {max(lengths)} and {new_tokens} new ones")
    rows = []
    jobs = ("read", "train", "write") if train else ("read", "write")
    for length, job in followed([(length, job) for length in lengths for job in jobs], "measurements"):
        made = {title: _JOBS[job](model, length, batch_size, new_tokens) for title, model in models.items()}
        times: dict[str, list[float]] = {title: [] for title in models}
        for turn in range(rounds + 1):  # the first turn warms up
            for title, run in made.items():
                seconds = _timed(run, models[title].device)
                if turn:
                    times[title].append(seconds)
        count = batch_size * (new_tokens if job == "write" else length)
        for title, model in models.items():
            rates = sorted(count / seconds for seconds in times[title])
            low, high = (rates[0], rates[-1]) if len(rates) < 4 else statistics.quantiles(rates, n=4)[::2]
            row = {"model": title, "length": length, "job": job, "tokens_per_second": statistics.median(rates)}
            rows.append(row | {"quartiles": [low, high], "state_bytes": state_bytes(model, length)})
    return rows


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _ids(model, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def _read(model, length: int, batch: int, new_tokens: int) -> Callable[[], Any]:
    ids = _ids(model, batch, length)

    @torch.no_grad()
    def run():
        model.eval()
        return model(ids, use_cache=True, logits_to_keep=1)

    return run


def _train(model, length: int, batch: int, new_tokens: int) -> Callable[[], Any]:
    ids = _ids(model, batch, length)

    def run():
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def _write(model, length: int, batch: int, new_tokens: int) -> Callable[[], Any]:
    """Only the new tokens are timed, hence the state of the text is made here, and copied by each run."""
    import copy

    ids = _ids(model, batch, length)
    with torch.no_grad():
        model.eval()
        past = cache_of(model(ids, use_cache=True, logits_to_keep=1))

    @torch.no_grad()
    def run():
        model.eval()
        cache, token = copy.deepcopy(past), ids[:, -1:]
        for _ in range(new_tokens):
            token = model(token, use_cache=True, **cache_keyword(cache)).logits[:, -1:].argmax(-1)

    return run


_JOBS = {"read": _read, "train": _train, "write": _write}


@torch.no_grad()
def state_bytes(model, length: int) -> int:
    """Bytes that the model keeps of one text of `length` tokens: our states, or another model's keys and values."""
    model.eval()
    cache = cache_of(model(_ids(model, 1, length), use_cache=True, logits_to_keep=1))
    if isinstance(cache, RecurrentCache):
        return cache.state_size()
    return sum(
        tensor.nbytes
        for layer in cache.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 1
    )


__all__ = ["compare_speed", "state_bytes"]
