"""The windowed mean: its linear implementation equals the definition in values, gradients and states, for every kind of input."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hf_linear_attn.modeling.shared import windowed_mean as module
from hf_linear_attn.modeling.shared.windowed_mean import attention_rows, windowed_mean, windowed_mean_reference

WINDOWS = [None, 1, 2, 3, 7, 16, 70]


def lengths(window):
    return (
        [1, 2, 3, 5, 13, 40] if window is None else sorted({1, 2, window, window + 1, 2 * window + 1, 3 * window + 1})
    )


@pytest.fixture(params=[4, 64], ids=["chunk4", "chunk64"])
def chunk(request, monkeypatch):
    """Chunks of 4 make short rows run through all three levels of the summation."""
    monkeypatch.setattr(module, "CHUNK", request.param)
    return request.param


def make(length, log_weights=False, masked=False, packed=False, seed=0):
    generator = torch.Generator().manual_seed(seed + length)
    values = torch.randn(2, length, 2, 3, 4, dtype=torch.float64, generator=generator)
    weights = 3 * torch.randn(2, length, 3, dtype=torch.float64, generator=generator)
    arguments = {"log_weights": log_weights}
    if masked:
        arguments["mask"] = torch.rand(2, length, generator=generator) < 0.6
    if packed:
        arguments["segment_ids"] = (torch.rand(2, length, generator=generator) < 0.25).long().cumsum(1)
    return values, weights if log_weights else weights.exp(), arguments


def sliced(arguments, start, stop):
    return {k: v[:, start:stop] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("log_weights", [False, True], ids=["plain", "log"])
@pytest.mark.parametrize("window", WINDOWS)
def test_equals_definition(chunk, window, log_weights, masked, packed):
    for length in lengths(window):
        values, weights, arguments = make(length, log_weights, masked, packed)
        expected = windowed_mean_reference(values, weights, window, **arguments)
        torch.testing.assert_close(windowed_mean(values, weights, window, **arguments)[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("log_weights", [False, True], ids=["plain", "log"])
@pytest.mark.parametrize("window", WINDOWS)
def test_pieces_equal_whole(chunk, window, log_weights):
    """Chunk by chunk and token by token through the state: the same means, padding inside or not."""
    for length in lengths(window):
        if chunk == 64 and length <= 64:
            continue  # one chunk: what chunks of 4 have shown at more places
        for masked in (False, True):
            values, weights, arguments = make(length, log_weights, masked)
            whole, _ = windowed_mean(values, weights, window, **arguments)
            for step in {max(1, length // 16), max(1, length // 2)}:
                state, pieces = None, []
                for start in range(0, length, step):
                    stop = start + step
                    mean, state = windowed_mean(
                        values[:, start:stop],
                        weights[:, start:stop],
                        window,
                        initial_state=state,
                        return_state=True,
                        **sliced(arguments, start, stop),
                    )
                    pieces.append(mean)
                torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-11, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 3, 16])
def test_state_of_padded_row_is_that_of_the_row_alone(window):
    values, weights, _ = make(11)
    lonely = windowed_mean(values[:, 3:9], weights[:, 3:9], window, return_state=True)[1]
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[:, 3:9] = True
    padded = windowed_mean(values, weights, window, mask=mask, return_state=True)[1]
    for ours, alone in zip(padded, lonely):
        if (
            window is not None
        ):  # places that nothing was written to have weight 0; what value stands there does not count
            alone, ours = alone[:, -6:], ours[:, -6:]
        torch.testing.assert_close(ours, alone, atol=1e-12, rtol=0)
    if window is not None:
        assert padded[1][:, :-6].abs().sum() == 0


@pytest.mark.parametrize("window", [None, 5])
def test_packed_state_holds_the_open_document_alone(window):
    values, weights, _ = make(12)
    segment_ids = torch.tensor([0] * 4 + [1] * 8).expand(2, -1)
    packed = windowed_mean(values, weights, window, segment_ids=segment_ids, return_state=True)[1]
    alone = windowed_mean(values[:, 4:], weights[:, 4:], window, return_state=True)[1]
    for ours, theirs in zip(packed, alone):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("log_weights", [False, True], ids=["plain", "log"])
@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_gradcheck(monkeypatch, window, log_weights):
    monkeypatch.setattr(module, "CHUNK", 4)
    values, weights, arguments = make(9, log_weights, masked=True, packed=True)
    values, weights = values[:1, :, :1].requires_grad_(), weights[:1].requires_grad_()
    arguments = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    state = windowed_mean(
        values[:, :5].detach(), weights[:, :5].detach(), window, log_weights=log_weights, return_state=True
    )[1]
    state = tuple(s.requires_grad_() for s in state[:2]) + tuple(state[2:])

    def run(values, weights, first, second):
        mean, left = windowed_mean(
            values, weights, window, initial_state=(first, second, *state[2:]), return_state=True, **arguments
        )
        # The state is checked by what follows from it: with log weights it is only defined up to its reference.
        follow, _ = windowed_mean(values, weights, window, log_weights=log_weights, initial_state=left)
        return mean, follow

    if window == 1:
        state = tuple(s.detach() for s in state)
    assert torch.autograd.gradcheck(run, (values, weights, *state[:2]))


@pytest.mark.parametrize("window", [4, 100, 5000])
def test_window_sums_keep_precision_at_a_million_tokens(window):
    """float32 within 1e-5 of float64: no difference of two large running sums anywhere."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 1_000_000, 1, 1, generator=generator) + 3
    weights = torch.rand(1, 1_000_000, 1, generator=generator)
    ours, _ = windowed_mean(values, weights, window)
    exact, _ = windowed_mean(values.double(), weights.double(), window)
    assert ((ours - exact).abs() / exact.abs().clamp(min=1)).max() < 1e-5
    rough, _ = windowed_mean(values.bfloat16(), weights.bfloat16(), window)
    assert rough.dtype == torch.bfloat16
    assert ((rough.double() - exact).abs() / exact.abs().clamp(min=1)).max() < 1e-2


def test_global_sums_keep_precision_at_a_million_tokens():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 1_000_000, 1, 1, generator=generator) + 3
    weights = torch.rand(1, 1_000_000, 1, generator=generator)
    ours, _ = windowed_mean(values, weights)
    exact, _ = windowed_mean(values.double(), weights.double())
    assert ((ours - exact).abs() / exact.abs()).max() < 1e-5


def test_log_weights_of_any_size_stay_finite():
    """exp(l) overflows float32 at 89; the mean of two tokens with logits 500 and 499 is their softmax all the same."""
    values = torch.tensor([[1.0, 3.0]]).view(1, 2, 1, 1)
    weights = torch.tensor([[500.0, 499.0]]).view(1, 2, 1).requires_grad_()
    mean, _ = windowed_mean(values, weights, log_weights=True)
    share = torch.softmax(torch.tensor([500.0, 499.0]), 0)
    torch.testing.assert_close(mean[0, 1, 0, 0], (share * torch.tensor([1.0, 3.0])).sum())
    mean.sum().backward()
    assert torch.isfinite(weights.grad).all()
    tiny, _ = windowed_mean(values, torch.full((1, 2, 1), -500.0), log_weights=True)
    assert torch.isfinite(tiny).all()
    assert tiny.abs().max() < 1e-5


def loudness(kind, weights, lengths):
    """Weights (1, T, 1) of packed documents that are loud, quiet, loud, ... by turns, and the values' scale (1, T, 1, 1)."""
    loud = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None, :, None] % 2 == 0
    if kind == "log":  # an exp focus
        return weights + torch.where(loud, 130.0, 10.0), torch.ones(1)
    return weights.exp() * torch.where(loud, 1e6, 1.0), torch.where(loud, 1e6, 1.0)[..., None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["log", "plain"])
@pytest.mark.parametrize("window", [None, 3, 40])
def test_a_loud_document_changes_nothing_in_a_quiet_one(monkeypatch, window, kind, dtype):
    """Means, gradients and states in single precision equal those of each document alone, wherever the borders stand."""
    monkeypatch.setattr(module, "CHUNK", 4)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for lengths in ([64, 16], [16, 64], [17, 23, 1, 30], [3, 5, 3], [1, 4, 1, 80]):
        generator = torch.Generator().manual_seed(sum(lengths))
        weights, scale = loudness(kind, torch.randn(1, sum(lengths), 1, generator=generator), lengths)
        if kind == "plain" and dtype == torch.float16:
            scale = scale.clamp(max=1e3)
        values = (torch.randn(1, sum(lengths), 1, 4, generator=generator) * scale).to(dtype).requires_grad_()
        weights.requires_grad_()
        documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
        arguments = {"window": window, "log_weights": kind == "log", "return_state": True}
        mean, state = windowed_mean(values, weights, segment_ids=documents, **arguments)
        cut = sum(lengths) // 2
        begun, left = windowed_mean(values[:, :cut], weights[:, :cut], segment_ids=documents[:, :cut], **arguments)
        rest = documents[:, cut:] - documents[:, cut - 1 : cut]  # 0 goes on with the state's document
        went_on, _ = windowed_mean(values[:, cut:], weights[:, cut:], segment_ids=rest, initial_state=left, **arguments)
        grads = torch.autograd.grad(mean.float().sin().sum(), (values, weights))
        parts = (values, weights, mean, torch.cat([begun, went_on], 1), *grads)
        pieces = zip(*(x.split(lengths, 1) for x in parts), strict=True)
        for value, weight, packed, in_calls, *of_inputs in pieces:
            value, weight = value.detach().requires_grad_(), weight.detach().requires_grad_()
            alone, wanted = windowed_mean(value, weight, **arguments)
            torch.testing.assert_close(packed, alone, **tolerance)
            torch.testing.assert_close(in_calls, alone, **tolerance)
            expected = torch.autograd.grad(alone.float().sin().sum(), (value, weight))
            torch.testing.assert_close(of_inputs, list(expected), **tolerance)
        follow, expected = (
            windowed_mean(values[:, :2], weights[:, :2], initial_state=found, **arguments)[0]
            for found in (state, wanted)
        )
        torch.testing.assert_close(follow, expected, **tolerance)


@pytest.mark.parametrize("log_weights", [False, True], ids=["plain", "log"])
@pytest.mark.parametrize("window", [None, 3])
def test_later_tokens_change_nothing_before_them(window, log_weights):
    values, weights, _ = make(150, log_weights)
    before, _ = windowed_mean(values, weights, window, log_weights=log_weights)
    values[:, 77:] *= 1e6
    weights[:, 77:] = 300.0
    after, _ = windowed_mean(values, weights, window, log_weights=log_weights)
    assert torch.equal(before[:, :77], after[:, :77])


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_reduced_matmul_precision_does_not_reach_the_sums(setting):
    values, weights, _ = make(300)
    values, weights = values.float(), weights.float()
    exact, _ = windowed_mean(values, weights)
    torch.set_float32_matmul_precision(setting)
    try:
        again, _ = windowed_mean(values, weights)
        parts = torch.randn(4, 64, 64).tril().sign(), torch.randn(4, 64, 8)
        split = module._product(*parts)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(again, exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(split, parts[0] @ parts[1], atol=1e-5, rtol=1e-6)


def test_autocast_does_not_reach_the_sums():
    values, weights, _ = make(200)
    values, weights = values.float(), weights.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = windowed_mean(values, weights)
    assert torch.equal(inside, windowed_mean(values, weights)[0])


def test_rows_of_the_attention_matrix_sum_to_one_up_to_eps():
    _, weights, arguments = make(20, masked=True, packed=True)
    rows = attention_rows(weights + 1, 5, **arguments)
    total = rows.sum(-1)
    assert total.max() <= 1
    assert (total[arguments["mask"][:, None].expand_as(total)] > 0.9999).all()
    assert (total[~arguments["mask"][:, None].expand_as(total)] == 0).all()


def test_no_tensor_of_length_by_length():
    """Nothing T x T and nothing that grows with the window is built."""
    from torch.utils._python_dispatch import TorchDispatchMode

    length = 2048
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    values, weights = torch.randn(1, length, 1, 8), torch.rand(1, length, 1)
    for window in (None, 4, 1000):
        for arguments in ({}, {"segment_ids": torch.zeros(1, length, dtype=torch.long)}, {"log_weights": True}):
            with Watch():
                windowed_mean(values, weights, window, **arguments)
    assert largest <= length * 2 * module.CHUNK  # the widest thing is a table of chunks
    assert largest < length * length / 10


@pytest.mark.parametrize("window", [None, pytest.param(4, marks=pytest.mark.slow), 100])
def test_compiles_as_one_graph_for_every_length(window):
    counter = CompileCounter()
    compiled = torch.compile(
        lambda v, w: windowed_mean(v, w, window, return_state=True), fullgraph=True, backend=counter, dynamic=True
    )
    for length in (70, 200, 333):
        values, weights = torch.randn(1, length, 2, 4), torch.rand(1, length, 2)
        ours, expected = compiled(values, weights), windowed_mean(values, weights, window, return_state=True)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("window", [None, 4, 100])
def test_exports_with_a_dynamic_length(window):
    class Mean(torch.nn.Module):
        def forward(self, values, weights):
            return windowed_mean(values, weights, window)[0]

    length = torch.export.Dim("length", min=2, max=100_000)
    example = torch.randn(1, 50, 2, 4), torch.rand(1, 50, 2)
    program = torch.export.export(Mean(), example, dynamic_shapes=({1: length}, {1: length}))
    for T in (2, 64, 65, 500):
        values, weights = torch.randn(1, T, 2, 4), torch.rand(1, T, 2)
        torch.testing.assert_close(
            program.module()(values, weights), windowed_mean(values, weights, window)[0], atol=1e-6, rtol=1e-5
        )
