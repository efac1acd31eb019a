"""The check that padding is invisible: outputs, loss, gradients and the state left behind are those of each text alone."""

import torch

from .batches import place, tokens
from .caches import is_hybrid

TOLERANCE = {"atol": 1e-10, "rtol": 1e-9}


def weighted_sum(hidden_states: torch.Tensor, seed: int) -> torch.Tensor:
    """A scalar in which every real token and feature counts differently."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(hidden_states.shape, generator=generator, dtype=hidden_states.dtype)
    return (hidden_states * factors).sum()


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients of all parameters, which are then forgotten."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict, wanted: dict) -> None:
    """Equal up to rounding; `k.bias`-like parameters without effect are zero in both."""
    assert any(g.abs().max() > 0 for g in wanted.values())
    for name, gradient in wanted.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(
            found[name], gradient, atol=1e-10 * scale, rtol=1e-8, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )


def check_body(model, layout, lengths: tuple[int, ...], garbage: int = 0, **options) -> None:
    """Hidden states at real tokens and gradients of a padded batch are those of the texts alone; padding stays finite."""
    rows, columns, ids, mask = padded_batch(layout, lengths, garbage)
    hidden = model(ids, attention_mask=mask, **options).last_hidden_state
    assert hidden.isfinite().all()
    sum(weighted_sum(hidden[i, where], i) for i, where in enumerate(columns)).backward()
    found = gradients(model)
    for i, (row, where) in enumerate(zip(rows, columns)):
        alone = model(row[None], **options).last_hidden_state[0]
        torch.testing.assert_close(hidden[i, where], alone, **TOLERANCE)
        weighted_sum(alone, i).backward()
    assert_same_gradients(found, gradients(model))


def check_loss(model, layout, lengths: tuple[int, ...], garbage: int = 0) -> None:
    """The loss of a padded batch, labels under the padding included, is the sum of the texts' losses; so are gradients."""
    rows, _, ids, mask = padded_batch(layout, lengths, garbage)
    targets = sum(lengths) - len(lengths)
    loss = targets * model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    found, total = gradients(model), 0.0
    for row in rows:
        alone = model(row[None], labels=row[None], num_items_in_batch=1).loss
        alone.backward()
        total = total + alone.detach()
    torch.testing.assert_close(loss.detach(), total, **TOLERANCE)
    assert_same_gradients(found, gradients(model))


def check_state(model, layout, lengths: tuple[int, ...], garbage: int = 0) -> None:
    """The state that a padded batch leaves is that of each text alone, and decoding goes on from it.

    Layers of softmax keep columns: they say what they hold in the tokens that come next.
    """
    rows, _, ids, mask = padded_batch(layout, lengths, garbage)
    step = tokens(len(rows), 2, seed=3)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).cache
        together = [[state.clone() for state in left_behind(layer)] for layer in cache.layers]
        logits = []
        for i in range(2):
            mask = torch.nn.functional.pad(mask, [0, 1], value=1)
            told = {"attention_mask": mask} if is_hybrid(cache) else {}
            logits.append(model(step[:, i : i + 1], cache=cache, **told).logits)
        for i, row in enumerate(rows):
            alone = model(row[None], use_cache=True).cache
            for states, layer in zip(together, alone.layers):
                for found, wanted in zip(states, left_behind(layer)):
                    torch.testing.assert_close(found[i : i + 1], wanted, **TOLERANCE)
            expected = model(torch.cat([row, step[i]])[None], use_cache=False).logits[:, -2:]
            torch.testing.assert_close(torch.cat(logits, 1)[i : i + 1], expected, **TOLERANCE)


def left_behind(layer) -> tuple[torch.Tensor, ...]:
    """The state of a recurrent layer and the lengths of its texts; nothing of a layer that keeps columns."""
    state = layer.get_state() if hasattr(layer, "get_state") else None
    return () if state is None else (*state, layer.get_token_counts())


def padded_batch(layout, lengths: tuple[int, ...], garbage: int = 0):
    """`(texts, their columns, ids, mask)`: texts of these lengths laid out by `layout(count) -> (columns, length)`."""
    rows = [tokens(1, length, seed=length)[0] for length in lengths]
    layouts = [layout(length) for length in lengths]
    columns = [where for where, _ in layouts]
    ids, mask = place(rows, columns, max(length for _, length in layouts), garbage)
    return rows, columns, ids, mask
