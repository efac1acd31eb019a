"""Checks of the forward pass, of padding, states, `generate()` and packed documents. Each raises where it fails."""

import torch
import transformers

from .models import Subject
from .probes import close, logits_of, packed, padded, rows_of, step, tensors_of, tokens

NEW = 10  # tokens that generate() adds


def forward(subject: Subject) -> None:
    """Forward"""
    logits = logits_of(subject.build(), tokens(subject, 2, 12))
    assert logits.shape[:2] == (2, 12)
    assert logits.isfinite().all()


def _half(subject: Subject, dtype: torch.dtype, tolerance: float) -> None:
    ids = tokens(subject, 2, 40)
    exact, rounded = logits_of(subject.build(), ids), logits_of(subject.build(dtype=dtype), ids).float()
    assert rounded.isfinite().all(), "not finite"
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert error < tolerance, f"relative error {error:.3f}"


def bfloat16(subject: Subject) -> None:
    """bfloat16 forward finite and within 5%"""
    _half(subject, torch.bfloat16, 0.05)


def float16(subject: Subject) -> None:
    """float16 forward finite and within 1%"""
    _half(subject, torch.float16, 0.01)


def _padding(subject: Subject, side: str) -> None:
    model, rows = subject.build(), rows_of(subject)
    ids, more = padded(subject, model, rows, side)
    together = logits_of(model, ids, **more)
    for row, found, mask in zip(rows, together, more["attention_mask"], strict=True):
        close(subject, found[mask.bool()], logits_of(model, row[None])[0])


def right_padding(subject: Subject) -> None:
    """Right padding leaves the logits of real tokens unchanged"""
    _padding(subject, "right")


def left_padding(subject: Subject) -> None:
    """Left padding leaves the logits of real tokens unchanged"""
    _padding(subject, "left")


def right_padded_prefill(subject: Subject) -> None:
    """Right-padded prefill, then decode, equals the unpadded (the state is right)"""
    model, rows = subject.build(), rows_of(subject)
    ids, more = padded(subject, model, rows, "right")
    new = tokens(subject, len(rows), 1, seed=5)
    _, cache = step(model, ids, **more)
    mask = torch.cat([more["attention_mask"], torch.ones_like(new)], 1)
    positions = {"position_ids": more["attention_mask"].sum(1, keepdim=True)} if "position_ids" in more else {}
    found, _ = step(model, new, cache, attention_mask=mask, **positions)
    for i, row in enumerate(rows):
        close(subject, found[i, -1], logits_of(model, torch.cat([row, new[i]])[None])[0, -1])


def greedy_text(subject: Subject, model, ids, **options) -> torch.Tensor:
    """Ids that `generate()` returns, greedily unless told otherwise."""
    transformers.set_seed(1)
    fixed = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    mask = {"attention_mask": options.pop("attention_mask", torch.ones_like(ids))}
    return model.generate(ids, **mask, **(fixed | options))


def ragged_generation(subject: Subject) -> None:
    """A ragged left-padded batch generates what each row alone generates"""
    model, rows = subject.build(), rows_of(subject)
    ids, more = padded(subject, model, rows, "left")
    together = greedy_text(subject, model, ids, attention_mask=more["attention_mask"])[:, ids.shape[1] :]
    for row, found in zip(rows, together, strict=True):
        assert found.tolist() == greedy_text(subject, model, row[None])[0, len(row) :].tolist(), "other tokens"


def one_token_a_step(subject: Subject) -> None:
    """One token a step equals the parallel forward"""
    model, ids = subject.build(), tokens(subject, 2, 20)
    logits, cache = step(model, ids[:, :1])
    found = [logits]
    for place in range(1, ids.shape[1]):
        logits, cache = step(model, ids[:, place : place + 1], cache)
        found.append(logits)
    close(subject, torch.cat(found, 1), logits_of(model, ids))


def two_chunks(subject: Subject) -> None:
    """Prefill in two chunks through the cache equals one"""
    model, ids = subject.build(), tokens(subject, 2, 30)
    _, cache = step(model, ids[:, :17])
    found, _ = step(model, ids[:, 17:], cache)
    close(subject, found, logits_of(model, ids)[:, 17:])


def fixed_state(subject: Subject) -> None:
    """The state does not grow with length"""
    model, sizes = subject.build(), []
    for length in (40, 160):
        _, cache = step(model, tokens(subject, 1, length))
        sizes.append(sum(tensor.nbytes for tensor in tensors_of(cache)))
    assert sizes[0] > 0, "no tensors found in the cache"
    assert sizes[0] == sizes[1], f"{sizes[0]:,} bytes after 40 tokens, {sizes[1]:,} after 160"


def _cache_or_not(subject: Subject, **options) -> None:
    model, ids = subject.build(), tokens(subject, 2, 11)
    with_cache, without = (greedy_text(subject, model, ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without), "other tokens with the cache than without"


def greedy(subject: Subject) -> None:
    """generate(): greedy with cache equals without"""
    _cache_or_not(subject)


def beam(subject: Subject) -> None:
    """generate(): beam search with cache equals without"""
    _cache_or_not(subject, num_beams=3)


def several_returns(subject: Subject) -> None:
    """generate(): several sampled sequences with cache equal those without"""
    _cache_or_not(subject, do_sample=True, num_return_sequences=3)


def prefill_chunks(subject: Subject) -> None:
    """generate(): `prefill_chunk_size` changes nothing"""
    model, ids = subject.build(), tokens(subject, 2, 11)
    expected = greedy_text(subject, model, ids)
    assert torch.equal(greedy_text(subject, model, ids, prefill_chunk_size=4), expected), "other tokens"


def static_cache(subject: Subject) -> None:
    """generate(): static cache"""
    model, ids = subject.build(), tokens(subject, 2, 11)
    expected = greedy_text(subject, model, ids)
    assert torch.equal(greedy_text(subject, model, ids, cache_implementation="static"), expected), "other tokens"


def assisted(subject: Subject) -> None:
    """generate(): assisted decoding equals greedy"""
    model, ids = subject.build(), tokens(subject, 1, 11)
    expected = greedy_text(subject, model, ids)
    for seed in (0, 1):
        assert torch.equal(greedy_text(subject, model, ids, assistant_model=subject.build(seed)), expected), (
            "other tokens"
        )


def _packing(subject: Subject, **options) -> None:
    model, rows = subject.build(), rows_of(subject)
    found = logits_of(model, **packed(subject, rows, **options))[0]
    close(subject, found, torch.cat([logits_of(model, row[None])[0] for row in rows]))


def packing_by_positions(subject: Subject) -> None:
    """Packing with restarting `position_ids` only equals separate documents"""
    _packing(subject)


def packing_by_offsets(subject: Subject) -> None:
    """Packing with `cu_seq_lens_q/k` equals separate documents"""
    _packing(subject, return_flash_attn_kwargs=True)


CHECKS = (
    forward,
    bfloat16,
    float16,
    right_padding,
    left_padding,
    right_padded_prefill,
    ragged_generation,
    one_token_a_step,
    two_chunks,
    fixed_state,
    greedy,
    beam,
    several_returns,
    prefill_chunks,
    static_cache,
    assisted,
    packing_by_positions,
    packing_by_offsets,
)
