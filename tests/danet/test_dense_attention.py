"""The mechanism: every pattern, order, chunk, mask, document and state against a token-by-token loop, in float64."""

import itertools

import pytest
import torch
from danet.brute_force import brute_force

from hf_linear_attn.modeling.danet.dense_attention import (
    dense_attention,
    dense_attention_reference,
    dense_attention_scores,
    pattern_mask,
)

WINDOW = 4
CASES = [("g", False), ("l", False), ("sl", False), ("g", True), ("l", True), ("sl", True), ("sw", True)]
CAUSAL = [case for case in CASES if case[1]]
TOL = {"rtol": 1e-10, "atol": 1e-10}


def tensors(batch=2, length=11, heads=2, dim=3, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, heads, dim, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)
        for _ in range(3)
    ]


@pytest.mark.parametrize(("pattern", "causal"), CASES)
@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_every_length_equals_the_pattern_written_out(pattern, causal, chunk):
    for length in range(1, 3 * chunk + 2):
        q, k, v = tensors(batch=1, length=length)
        out, state = dense_attention(q, k, v, pattern=pattern, is_causal=causal, window_size=WINDOW, chunk_size=chunk)
        torch.testing.assert_close(out, brute_force(q, k, v, pattern, WINDOW, causal), **TOL)
        assert state is None


@pytest.mark.parametrize(("pattern", "causal"), CASES)
def test_reference_is_the_definition(pattern, causal):
    q, k, v = tensors()
    ranks = torch.arange(q.shape[1])
    mask = pattern_mask(pattern, ranks, ranks, causal, WINDOW)
    expected = brute_force(q, k, v, pattern, WINDOW, causal)
    torch.testing.assert_close(dense_attention_reference(q, k, v, mask), expected, **TOL)
    scores = dense_attention_scores(q, k, mask)
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", scores, v), expected, **TOL)


@pytest.mark.parametrize("pattern", ["g", "l", "sl"])
@pytest.mark.parametrize(("length", "heads"), [(2, 1), (9, 1), (9, 2)])
def test_orders_agree_in_value_and_gradient(pattern, length, heads):
    results = []
    for mode in ("linear", "quadratic", "auto"):
        q, k, v = tensors(length=length, heads=heads, requires_grad=True)
        out, _ = dense_attention(q, k, v, pattern=pattern, window_size=WINDOW, mode=mode)
        out.pow(2).sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, **TOL)


@pytest.mark.parametrize(("pattern", "causal"), CASES)
def test_a_shared_key_and_value_gives_the_same(pattern, causal):
    q, k, _ = tensors()
    shared, _ = dense_attention(q, k, k, pattern=pattern, is_causal=causal, window_size=WINDOW, chunk_size=4)
    apart, _ = dense_attention(q, k, k.clone(), pattern=pattern, is_causal=causal, window_size=WINDOW, chunk_size=4)
    torch.testing.assert_close(shared, apart, **TOL)


MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 11],
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [0] + [1] * 10],
    "both": [[0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0], [1] * 11],
    "inside": [[1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]],
    "empty row": [[0] * 11, [1] * 10 + [0]],
}


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize(("pattern", "causal"), CASES)
def test_padding_at_any_side_is_the_identity(pattern, causal, side):
    q, k, v = tensors(requires_grad=True)
    mask = torch.tensor(MASKS[side])
    options = {"pattern": pattern, "is_causal": causal, "window_size": WINDOW, "chunk_size": 4}
    out, _ = dense_attention(q, k, v, attention_mask=mask, **options)
    torch.testing.assert_close(out, brute_force(q, k, v, pattern, WINDOW, causal, mask), **TOL)
    out.pow(2).sum().backward()
    grads = [x.grad.clone() for x in (q, k, v)]
    for row in range(2):  # each row alone, without its padding
        keep = mask[row].bool()
        if not keep.any():
            assert all((g[row] == 0).all() for g in grads)
            continue
        alone = [x.detach()[row : row + 1, keep].requires_grad_() for x in (q, k, v)]
        dense_attention(*alone, **options)[0].pow(2).sum().backward()
        for whole, part in zip(grads, alone, strict=True):
            torch.testing.assert_close(whole[row : row + 1, keep], part.grad, **TOL)
            assert (whole[row, ~keep] == 0).all()


SEGMENTS = [[0] * 3 + [1] * 2 + [2] * 6, [0] + [1] * 9 + [2]]


@pytest.mark.parametrize("side", [None, "right", "inside"])
@pytest.mark.parametrize("chunk", [1, 2, 4, 16])
@pytest.mark.parametrize(("pattern", "causal"), CASES)
def test_packed_documents_do_not_see_each_other(pattern, causal, chunk, side):
    q, k, v = tensors()
    segments = torch.tensor(SEGMENTS)
    mask = None if side is None else torch.tensor(MASKS[side])
    options = {"pattern": pattern, "is_causal": causal, "window_size": WINDOW, "chunk_size": chunk}
    out, _ = dense_attention(q, k, v, segment_ids=segments, attention_mask=mask, **options)
    torch.testing.assert_close(out, brute_force(q, k, v, pattern, WINDOW, causal, mask, segments), **TOL)


@pytest.mark.parametrize(("pattern", "causal"), CASES)
def test_products_between_documents_may_overflow(pattern, causal):
    """float16: a query of one document with a key, or with the memory, of another one is beyond 65504, and counts as 0."""
    query, key, value = torch.zeros(1, 16, 1, 4), torch.zeros(1, 16, 1, 4), tensors(1, 16, 1, 4)[2].float()
    key[:, :9, :, 0], query[:, :9, :, 1], value[:, :9] = 400, 1, 60  # document 0: keys and queries at right angles
    query[:, 9:, :, 0], query[:, 9:, :, 1], key[:, 9:, :, 1] = 400, 1, 1
    query, key, value = query.half(), key.half(), value.half()
    documents = torch.tensor([[0] * 9 + [1] * 7])
    options = {"pattern": pattern, "is_causal": causal, "window_size": WINDOW, "chunk_size": 4}
    alone, _ = dense_attention(query[:, 9:], key[:, 9:], value[:, 9:], **options)
    packed, _ = dense_attention(query, key, value, segment_ids=documents, **options)
    torch.testing.assert_close(packed[:, 9:], alone, atol=2e-2, rtol=2e-2)
    if causal:
        first, rest = (tuple(x[:, part] for x in (query, key, value)) for part in (slice(0, 6), slice(6, None)))
        _, state = dense_attention(*first, output_final_state=True, **options)
        went_on, _ = dense_attention(*rest, segment_ids=documents[:, 6:], initial_state=state, **options)
        torch.testing.assert_close(went_on[:, 3:], alone, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize(("pattern", "causal"), CASES)
def test_what_stands_at_padding_does_not_matter(pattern, causal, side):
    q, k, v = tensors()
    mask = torch.tensor(MASKS[side])
    options = {"pattern": pattern, "is_causal": causal, "window_size": WINDOW, "attention_mask": mask}
    plain, _ = dense_attention(q, k, v, **options)
    for x in (q, k, v):
        x[mask == 0] = float("nan")
    assert torch.equal(dense_attention(q, k, v, **options)[0], plain)


def run_in_pieces(q, k, v, cuts, mask=None, **options):
    outs, state = [], None
    for start, stop in itertools.pairwise(cuts):
        part = slice(start, stop)
        out, state = dense_attention(
            q[:, part],
            k[:, part],
            v[:, part],
            attention_mask=None if mask is None else mask[:, part],
            is_causal=True,
            initial_state=state,
            output_final_state=True,
            **options,
        )
        outs.append(out)
    return torch.cat(outs, dim=1), state


@pytest.mark.parametrize("side", [None, *MASKS])
@pytest.mark.parametrize("cuts", [[0, 11], [0, 5, 11], [0, 4, 8, 11], [0, 1, 3, 9, 10, 11], list(range(12))])
@pytest.mark.parametrize(("pattern", "causal"), CAUSAL)
def test_pieces_through_the_state_equal_the_whole(pattern, causal, cuts, side):
    q, k, v = tensors()
    mask = None if side is None else torch.tensor(MASKS[side])
    options = {"pattern": pattern, "window_size": WINDOW, "chunk_size": 2}
    out, state = run_in_pieces(q, k, v, cuts, mask, **options)
    torch.testing.assert_close(out, brute_force(q, k, v, pattern, WINDOW, causal, mask), **TOL)
    _, whole = run_in_pieces(q, k, v, [0, 11], mask, **options)
    torch.testing.assert_close(state.memory, whole.memory, **TOL)
    assert torch.equal(state.count, whole.count)


@pytest.mark.parametrize(("pattern", "causal"), CAUSAL)
@pytest.mark.parametrize("length", range(1, 12))
def test_state_is_that_of_the_unpadded_row(pattern, causal, length):
    q, k, v = tensors(batch=1, length=length)
    mask = torch.zeros(1, 14, dtype=torch.long)
    where = torch.randperm(14, generator=torch.Generator().manual_seed(length))[:length].sort().values
    mask[0, where] = 1
    garbage = torch.full((1, 14, 2, 3), 7.0, dtype=torch.float64)
    padded = [garbage.clone().index_copy(1, where, x) for x in (q, k, v)]
    options = {"pattern": pattern, "window_size": WINDOW, "is_causal": True, "output_final_state": True}
    _, expected = dense_attention(q, k, v, **options)
    _, state = dense_attention(*padded, attention_mask=mask, **options)
    torch.testing.assert_close(state.memory, expected.memory, **TOL)
    assert torch.equal(state.count, expected.count)


@pytest.mark.parametrize("cut", [1, 4, 5, 7, 10])
@pytest.mark.parametrize(("pattern", "causal"), CAUSAL)
def test_documents_go_on_from_a_state_only_where_they_continue(pattern, causal, cut):
    q, k, v = tensors()
    segments = torch.tensor(SEGMENTS)
    options = {
        "pattern": pattern,
        "window_size": WINDOW,
        "chunk_size": 2,
        "is_causal": True,
        "output_final_state": True,
    }
    whole, end = dense_attention(q, k, v, segment_ids=segments, **options)
    first, state = dense_attention(q[:, :cut], k[:, :cut], v[:, :cut], segment_ids=segments[:, :cut], **options)
    rest = segments[:, cut:] - segments[:, cut - 1 : cut]  # 0 = the document that the state belongs to
    second, state = dense_attention(
        q[:, cut:], k[:, cut:], v[:, cut:], segment_ids=rest, initial_state=state, **options
    )
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, **TOL)
    torch.testing.assert_close(state.memory, end.memory, **TOL)
    assert torch.equal(state.count, end.count)


@pytest.mark.parametrize(("pattern", "causal"), CAUSAL)
def test_causal_outputs_do_not_change_with_later_tokens(pattern, causal):
    q, k, v = tensors(length=13)
    options = {"pattern": pattern, "window_size": WINDOW, "chunk_size": 4, "is_causal": True}
    before, _ = dense_attention(q, k, v, **options)
    for x in (q, k, v):
        x[:, 7:] += 3.0
    after, _ = dense_attention(q, k, v, **options)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize(("pattern", "causal"), CAUSAL)
def test_gradients_flow_through_the_state(pattern, causal):
    q, k, v = tensors(requires_grad=True)
    options = {"pattern": pattern, "window_size": WINDOW, "chunk_size": 2}
    run_in_pieces(q, k, v, [0, 3, 4, 11], **options)[0].pow(2).sum().backward()
    grads = [x.grad.clone() for x in (q, k, v)]
    q, k, v = tensors(requires_grad=True)
    run_in_pieces(q, k, v, [0, 11], **options)[0].pow(2).sum().backward()
    for a, b in zip(grads, (q, k, v), strict=True):
        torch.testing.assert_close(a, b.grad, **TOL)


def test_half_precision_keeps_its_state_in_float32():
    q, k, v = (x.to(torch.bfloat16) for x in tensors(length=300, heads=1, dim=8))
    for pattern in ("g", "l", "sl"):
        _, state = dense_attention(
            q, k, v, pattern=pattern, is_causal=True, window_size=WINDOW, chunk_size=64, output_final_state=True
        )
        assert state.memory.dtype == torch.float32


def test_a_long_decode_in_bfloat16_keeps_the_state():
    steps, dim = 16384, 8
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, steps, 1, dim, generator=generator) * 0.1).to(torch.bfloat16)
    _, state = dense_attention(x[:, :1], x[:, :1], x[:, :1], is_causal=True, output_final_state=True)
    for t in range(1, steps):
        _, state = dense_attention(
            x[:, t : t + 1], x[:, t : t + 1], x[:, t : t + 1], is_causal=True, initial_state=state
        )
    exact = torch.einsum("bthd,bthe->bhde", x.double(), x.double())
    assert ((state.memory.double() - exact).norm() / exact.norm()).item() < 1e-4


@pytest.mark.parametrize(("pattern", "causal"), CASES)
def test_compiles_without_a_graph_break(pattern, causal):
    torch._dynamo.reset()
    q, k, v = tensors()
    mask = torch.tensor(MASKS["inside"])

    def call(q, k, v, mask):
        return dense_attention(
            q, k, v, pattern=pattern, is_causal=causal, window_size=WINDOW, chunk_size=4, attention_mask=mask
        )[0]

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, mask), call(q, k, v, mask), **TOL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "local"}, "pattern"),
        ({"pattern": "sw", "window_size": 4}, "causal"),
        ({"pattern": "l"}, "window_size"),
        ({"pattern": "l", "window_size": 0}, "window_size"),
        ({"pattern": "sl", "window_size": 5}, "even"),
        ({"mode": "fast"}, "mode"),
        ({"output_final_state": True}, "is_causal"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        dense_attention(*tensors(length=3), **options)
