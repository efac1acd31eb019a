"""Means whose weights fade: the chunked sums equal the definition in values, gradients, states."""

import math

import pytest
import torch

from hf_linear_attn.modeling.shared import windowed_mean as means
from hf_linear_attn.modeling.shared.layers import decayed_sum as module
from hf_linear_attn.modeling.shared.windowed_mean import windowed_mean, windowed_mean_reference

RATES = torch.tensor(
    [0.0, 0.05, 1.3], dtype=torch.float64
)  # a head that forgets nothing, one over a chunk, one at once


@pytest.fixture(params=[4, 64], ids=["chunk4", "chunk64"])
def chunk(request, monkeypatch):
    """Chunks of 4 make short rows run through all three levels."""
    monkeypatch.setattr(module, "CHUNK", request.param)
    return request.param


def make(length, log_weights=False, masked=False, packed=False):
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(2, length, 2, 3, 4, dtype=torch.float64, generator=generator)
    logs = 3 * torch.randn(2, length, 3, dtype=torch.float64, generator=generator)
    arguments = {"log_weights": log_weights, "decay": RATES}
    if masked:
        arguments["mask"] = torch.rand(2, length, generator=generator) < 0.6
    if packed:
        arguments["segment_ids"] = (torch.rand(2, length, generator=generator) < 0.25).long().cumsum(1)
    return values, logs if log_weights else logs.exp(), arguments


def by_hand(values, weights, mask=None, segment_ids=None, log_weights=False, decay=RATES):
    """The equation, token by token."""
    batch, length = weights.shape[:2]
    weights = weights.exp() if log_weights else weights
    out = torch.zeros_like(values)
    for b in range(batch):
        seen = []
        for i in range(length):
            if mask is not None and not mask[b, i]:
                continue
            if segment_ids is not None and seen and segment_ids[b, seen[-1]] != segment_ids[b, i]:
                seen = []
            seen.append(i)
            ages = torch.arange(len(seen) - 1, -1, -1, dtype=torch.float64)
            left = weights[b, seen] * torch.exp(-decay * ages[:, None])  # (n, H)
            out[b, i] = torch.einsum("nh,nphe->phe", left, values[b, seen]) / (left.sum(0)[:, None] + means.EPS)
    return out


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("log_weights", [False, True], ids=["plain", "log"])
def test_equals_definition(chunk, log_weights, masked, packed):
    for length in (1, 2, 5, 17, 70):
        values, weights, arguments = make(length, log_weights, masked, packed)
        expected = by_hand(values, weights, **arguments)
        found, _ = windowed_mean(values, weights, **arguments)
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
        reference = windowed_mean_reference(values, weights, **arguments)
        torch.testing.assert_close(reference, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("log_weights", [False, True], ids=["plain", "log"])
def test_pieces_equal_whole(chunk, log_weights):
    """Calls of any length through the state, padding inside or not, tokens one by one too."""
    for masked in (False, True):
        values, weights, arguments = make(70, log_weights, masked)
        whole, end = windowed_mean(values, weights, return_state=True, **arguments)
        for step in (1, 9, 33):
            state, pieces = None, []
            for start in range(0, 70, step):
                part = slice(start, start + step)
                given = arguments | ({"mask": arguments["mask"][:, part]} if masked else {})
                mean, state = windowed_mean(
                    values[:, part], weights[:, part], initial_state=state, return_state=True, **given
                )
                pieces.append(mean)
            torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-11, rtol=0)
            if not log_weights:
                for ours, theirs in zip(state, end):
                    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_control_padding_that_ages_is_seen(monkeypatch):
    values, weights, arguments = make(17, masked=True)
    real = means.decayed_sum
    monkeypatch.setattr(means, "decayed_sum", lambda x, rates, mask, *more: real(x, rates, None, *more))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            windowed_mean(values, weights, **arguments)[0], by_hand(values, weights, **arguments)
        )


@pytest.mark.parametrize("log_weights", [False, True], ids=["plain", "log"])
def test_gradcheck(monkeypatch, log_weights):
    """Also of the rates, which half-lives are learned through, and of the state."""
    monkeypatch.setattr(module, "CHUNK", 4)
    values, weights, arguments = make(9, log_weights, masked=True, packed=True)
    state = windowed_mean(values[:, :5], weights[:, :5], log_weights=log_weights, decay=RATES, return_state=True)[1]
    inputs = [values[:1, :, :1], weights[:1], RATES + 0.1, state[0][:1, :1], state[1][:1]]
    told = {name: x[:1] for name, x in arguments.items() if name in ("mask", "segment_ids")}

    def run(values, weights, decay, sums, norm):
        before = (sums, norm, *(x[:1] for x in state[2:]))
        mean, left = windowed_mean(
            values, weights, log_weights=log_weights, decay=decay, initial_state=before, return_state=True, **told
        )
        # The state is checked by what follows from it: with log weights it is only defined up to its reference.
        return mean, windowed_mean(values, weights, log_weights=log_weights, decay=decay, initial_state=left)[0]

    torch.autograd.gradcheck(run, [x.detach().clone().requires_grad_() for x in inputs])


def test_a_loud_past_fades_and_leaves_no_hole():
    """Log weights 300 below those of long ago: what has faded sets no scale for what came since, and no mean becomes 0/0."""
    values = torch.randn(1, 2000, 1, 1, 3)
    logs = torch.zeros(1, 2000, 1)
    logs[:, :3] = 300.0
    decay = torch.tensor([0.35])
    for start in (None, 3):
        if start is None:
            mean, _ = windowed_mean(values, logs, log_weights=True, decay=decay)
        else:
            _, state = windowed_mean(values[:, :3], logs[:, :3], log_weights=True, decay=decay, return_state=True)
            mean, _ = windowed_mean(values[:, 3:], logs[:, 3:], log_weights=True, decay=decay, initial_state=state)
        wide = windowed_mean_reference(values.double(), logs.double(), log_weights=True, decay=decay.double())
        torch.testing.assert_close(mean.double(), wide[:, start or 0 :], atol=2e-5, rtol=0)


@pytest.mark.parametrize("exponential", [False, True], ids=["plain", "log"])
def test_a_long_text_in_half_precision(exponential):
    """64 thousand tokens in bfloat16: sums are float32, and as close to float64 as the inputs' rounding lets them be."""
    length = 1 << 16
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, length, 1, 3, 2, generator=generator).bfloat16()
    weights = torch.randn(1, length, 3, generator=generator).bfloat16()
    weights = weights if exponential else weights.abs() + 0.1
    decay = math.log(2) / torch.tensor([2.0, 512.0, 1e9])
    found, state = windowed_mean(values, weights, log_weights=exponential, decay=decay, return_state=True)
    wide, _ = windowed_mean(values.double(), weights.double(), log_weights=exponential, decay=decay.double())
    assert found.dtype == torch.bfloat16
    assert state[0].dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), wide, atol=1e-4, rtol=2**-8)


def test_products_are_exact_where_tf32_is_allowed(monkeypatch):
    """Tables of fading weights are no 0/1 matrices: both sides of a product are split into bf16 parts."""
    values, weights, _ = make(70)
    values, weights, decay = values.float().requires_grad_(), weights.float(), RATES.float()
    plain, _ = windowed_mean(values, weights, decay=decay)
    monkeypatch.setattr(module, "float32_products_are_rounded", lambda: True)
    monkeypatch.setattr(torch, "einsum", rounded(torch.einsum))
    split, _ = windowed_mean(values, weights, decay=decay)
    torch.testing.assert_close(split, plain, atol=2e-6, rtol=1e-5)
    split.sum().backward()
    assert values.grad.isfinite().all()


def rounded(einsum):
    """A product that keeps 11 bits of its factors, as TF32 does."""
    return lambda equation, *factors: einsum(equation, *(x.bfloat16().to(x.dtype) for x in factors))


def test_compiles_to_one_graph_of_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: windowed_mean(*x[:2], decay=x[2])[0], backend="eager", fullgraph=True)
    for length in (70, 130, 200):
        values, weights, _ = make(length)
        torch.testing.assert_close(compiled(values, weights, RATES), windowed_mean(values, weights, decay=RATES)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("logs", [None, 1.0, 30.0], ids=["plain", "logs", "large logs"])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "holes"])
@pytest.mark.parametrize("length", [5, 200])
def test_the_operator_that_compilers_see_has_the_gradients_of_the_sums(length, masked, documents, logs):
    """Its transpose is written out; autograd of the plain code is what it has to be."""
    torch.manual_seed(0)
    mask = torch.rand(2, length) > 0.3 if masked else None
    x, rates = torch.randn(2, length, 3, 5).double(), torch.tensor([0.5, 0.02, 0.0005]).double()
    segments = torch.randint(0, 2, (2, length)).cumsum(1) // max(1, length // 6) if documents else None
    weights = None if logs is None else torch.randn(2, length, 3).double() * logs
    if mask is not None:
        x = x * mask[..., None, None]
        weights = None if weights is None else weights.masked_fill(~mask[..., None], -torch.inf)
    steps = None if mask is None else mask.double()

    def results(function):
        given = [t.clone().requires_grad_() for t in (x, rates, weights) if t is not None]
        out = function(given[0], given[1], steps, segments, given[2] if logs is not None else None)
        return out[0].detach(), *torch.autograd.grad(
            (out[0] * torch.arange(out[0].numel()).view_as(out[0]).sin()).sum(), given
        )

    plain = results(lambda *given: module._decayed_sum(*given, 0))
    for found, expected in zip(results(module._as_written), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * max(1.0, float(expected.abs().max())))
    if length == 5:
        torch.library.opcheck(module._as_written, (x, rates, steps, segments, weights))
