"""Hedgehog attention in linear time is its definition: outputs, gradients and states, however the tokens come."""

import pytest
import torch
from common.batches import LAYOUTS

from hf_linear_attn.modeling.hedgehog.mechanism import (
    HedgehogState,
    hedgehog_attention,
    hedgehog_attention_reference,
    hedgehog_state_reference,
    hedgehog_weights,
)

HEADS, GROUPS, SIZE, FEATURES = 4, 2, 6, 5
TOLERANCE = {"atol": 1e-11, "rtol": 1e-9}
NAMES = ("query", "key", "value", "query_map", "key_map", "gain")


def inputs(batch: int, length: int, seed: int = 0, dtype=torch.float64, groups: int = GROUPS) -> dict:
    """Random tensors of every argument, which record gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    made = {name: draw(batch, length, heads, SIZE) for name, heads in zip(NAMES, (HEADS, groups, groups))}
    return made | {
        "query_map": draw(HEADS, SIZE, FEATURES),
        "key_map": draw(groups, SIZE, FEATURES),
        "gain": draw(HEADS),
    }


def forgetting(batch: int, length: int, groups: int = GROUPS) -> torch.Tensor:
    """Logarithms of what tokens leave, some of them much."""
    generator = torch.Generator().manual_seed(7)
    drawn = -(torch.rand(batch, length, groups, generator=generator, dtype=torch.float64) ** 3)
    return drawn.requires_grad_()


def assert_same_with_gradients(run, reference, made: dict, **options) -> None:
    """Both give the same, also at what weights each number of the output differently."""
    wanted = reference(**made, **options)
    found, _ = run(**made, **options)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    factors = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    tensors = [*made.values()] + [x for x in (options.get("log_decay"),) if x is not None]
    pairs = [torch.autograd.grad((out * factors).sum(), tensors, allow_unused=True) for out in (found, wanted)]
    for one, other in zip(*pairs):
        torch.testing.assert_close(one, other if other is not None else torch.zeros_like(one), **TOLERANCE)


@pytest.mark.parametrize("decays", [False, True], ids=["", "forgetting"])
@pytest.mark.parametrize(
    ("length", "window", "chunk"), [(1, 3, 4), (9, 1, 4), (13, 3, 4), (12, 5, 2), (7, 16, 3), (300, 4, 2)]
)
def test_the_definition(length, window, chunk, decays):
    """The last length has more chunks than one product sums."""
    made = inputs(2, length)
    log_decay = forgetting(2, length) if decays else None
    assert_same_with_gradients(
        lambda **given: hedgehog_attention(**given, chunk_size=chunk),
        hedgehog_attention_reference,
        made,
        window=window,
        log_decay=log_decay,
        softcap=3.0 if length == 13 else None,
        scale=0.7,
    )


@pytest.mark.parametrize("decays", [False, True], ids=["", "forgetting"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding(layout, decays):
    columns, length = LAYOUTS[layout](11)
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[0, columns] = True
    mask[1, columns[:4]] = True
    log_decay = forgetting(2, length) if decays else None
    assert_same_with_gradients(
        lambda **given: hedgehog_attention(**given, chunk_size=4),
        hedgehog_attention_reference,
        inputs(2, length),
        window=3,
        mask=mask,
        log_decay=log_decay,
    )


@pytest.mark.parametrize("decays", [False, True], ids=["", "forgetting"])
@pytest.mark.parametrize("padded", [False, True])
def test_documents(padded, decays):
    """Also of one token, of whole chunks, over several chunks, and with padding inside."""
    ids = torch.tensor([[0] * 6 + [1] + [2] * 12 + [3] * 8 + [4] * 3, [0] * 4 + [2] * 4 + [5] * 22])
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) > 0.3 if padded else None
    log_decay = forgetting(*ids.shape) if decays else None
    assert_same_with_gradients(
        lambda **given: hedgehog_attention(**given, chunk_size=4),
        hedgehog_attention_reference,
        inputs(*ids.shape),
        window=3,
        mask=mask,
        segment_ids=ids,
        log_decay=log_decay,
    )


def cut(made: dict, where: slice, more: dict) -> dict:
    """The arguments for some of the tokens."""
    tokens = {name: made[name][:, where] for name in NAMES[:3]}
    return made | tokens | {name: None if x is None else x[:, where] for name, x in more.items()}


@pytest.mark.parametrize("decays", [False, True], ids=["", "forgetting"])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_calls_with_a_state_are_one_call(window, decays):
    """At every border; gradients flow through the state."""
    length = 11
    made, more = inputs(2, length), {"log_decay": forgetting(2, length) if decays else None}
    for border in range(1, length):

        def run(border=border, **given):
            outs, state = [], None
            for where in (slice(0, border), slice(border, length)):
                parts = cut({name: given[name] for name in NAMES}, where, {"log_decay": given["log_decay"]})
                out, state = hedgehog_attention(
                    **parts, window=window, initial_state=state, return_state=True, chunk_size=4
                )
                outs.append(out)
            return torch.cat(outs, 1), state

        assert_same_with_gradients(
            run, lambda **given: hedgehog_attention_reference(**given, window=window), made, **more
        )


@pytest.mark.parametrize("decays", [False, True], ids=["", "forgetting"])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("calls", [[1] * 13, [5, 1, 1, 6], [13]], ids=["steps", "mixed", "whole"])
def test_states(calls, window, decays):
    """The state is the definition's, with padding anywhere and after packed documents, in calls of any length."""
    length = sum(calls)
    made, log_decay = inputs(3, length), forgetting(3, length) if decays else None
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, 2:6] = mask[1, 11] = mask[2] = False
    state, outs = None, []
    with torch.no_grad():
        start = 0
        for count in calls:
            where = slice(start, start + count)
            parts = cut(made, where, {"log_decay": log_decay, "mask": mask})
            out, state = hedgehog_attention(
                **parts, window=window, initial_state=state, return_state=True, chunk_size=4
            )
            outs.append(out)
            start += count
        wanted = hedgehog_attention_reference(**made, window=window, log_decay=log_decay, mask=mask)
        torch.testing.assert_close(torch.cat(outs, 1), wanted, **TOLERANCE)
        for row in range(2):
            tokens = (x[row : row + 1, mask[row]] for x in (made["key"], made["value"]))
            alone = None if log_decay is None else log_decay[row : row + 1, mask[row]]
            for found, expected in zip(
                state, hedgehog_state_reference(*tokens, made["key_map"], window=window, log_decay=alone)
            ):
                torch.testing.assert_close(found[row : row + 1], expected, **TOLERANCE)
        assert all(not part[2].any() for part in state)


def test_the_last_document_is_what_a_state_holds():
    made = inputs(2, 14)
    ids = torch.tensor([[0] * 5 + [1] * 9, [0] * 14])
    with torch.no_grad():
        first = cut(made, slice(0, 4), {})
        state = hedgehog_attention(**first, window=3, return_state=True)[1]
        out, state = hedgehog_attention(
            **cut(made, slice(4, 14), {"segment_ids": ids}),
            window=3,
            initial_state=state,
            return_state=True,
            chunk_size=4,
        )
        wanted = hedgehog_attention_reference(**made, window=3, segment_ids=ids)[:, 4:]
        torch.testing.assert_close(out, wanted, **TOLERANCE)
        for row, start in enumerate((5, 0)):
            tokens = (x[row : row + 1, start:] for x in (made["key"], made["value"]))
            for found, expected in zip(state, hedgehog_state_reference(*tokens, made["key_map"], window=3)):
                torch.testing.assert_close(found[row : row + 1], expected, **TOLERANCE)


def test_softmax_inside_the_window():
    """Whatever the features: texts up to the window see nothing but softmax attention."""
    made = inputs(2, 9)
    found = hedgehog_attention(**made, window=9)[0]
    query, key, value = (made[name].transpose(1, 2) for name in NAMES[:3])
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, wanted.transpose(1, 2), **TOLERANCE)


def test_weights_sum_to_one():
    made = inputs(2, 9)
    weights = hedgehog_weights(*(made[name] for name in ("query", "key", "query_map", "key_map", "gain")), window=3)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert bool((weights[..., 8, :] > 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    """Logits of 10^5 and sums of thousands of tokens, beyond what float16 holds."""
    made = inputs(1, 700, dtype=dtype)
    made["query"], made["key"] = (made[name].detach() * 200 for name in ("query", "key"))
    with torch.no_grad():
        found, state = hedgehog_attention(**made, window=4, return_state=True)
        wanted = hedgehog_attention_reference(**{name: x.double() for name, x in made.items()}, window=4)
    assert found.dtype == dtype
    assert state.ring.dtype == dtype
    assert state.matrix.dtype == state.vector.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)


def test_garbage_under_padding_reaches_nothing():
    made = {name: x.detach() for name, x in inputs(1, 6).items()}
    mask = torch.tensor([[True, True, False, True, True, True]])
    garbage = made | {name: made[name].clone() for name in NAMES[:3]}
    for name in NAMES[:3]:
        garbage[name][:, 2] = torch.nan
    one, other = (hedgehog_attention(**each, window=2, mask=mask, return_state=True) for each in (made, garbage))
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(x, y) for x, y in zip(one[1], other[1]))


def test_a_state_can_be_built_from_a_tuple():
    made = inputs(1, 5)
    state = hedgehog_attention(**made, window=3, return_state=True)[1]
    assert isinstance(state, HedgehogState)
    assert [tuple(x.shape[1:]) for x in state] == [(2, 3, GROUPS, SIZE), (GROUPS, 10, SIZE), (GROUPS, 10), ()]
