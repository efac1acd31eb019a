"""torch.compile without graph breaks and without recompiling at each step; torch.export with fixed and dynamic shapes."""

import pytest
import torch
from common.batches import LAYOUTS, tokens
from common.families import FIRST, TRACED, TRACED_CAUSAL, first_rows, in_every_run, traced_rows
from common.padding import padded_batch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from transformers import StaticCache

from hf_linear_attn import RecurrentCache

pytestmark = pytest.mark.long

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graphs of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def traced(function, backend="eager"):
    """`function` in one graph, run as it is (no code is generated, which takes minutes), and the counter of graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True), counter


@in_every_run("leap", "fastformer", "danet-cosine", "danet-encoder", of=TRACED)
def test_forward_is_one_graph(row):
    """With a mask; without one in the tests of lengths and of training."""
    model = row.build("AutoModel", **row.layers(2))
    compiled, counter = traced(model)
    _, _, ids, mask = padded_batch(LAYOUTS["both"], (70, 23))
    with torch.no_grad():
        found = compiled(ids, attention_mask=mask, use_cache=False).last_hidden_state
        expected = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        torch.testing.assert_close(found, expected, **CLOSE)
    assert counter.frame_count == 1


@in_every_run("leap", of=FIRST)
def test_packed_forward_is_one_graph(row):
    model = row.causal_lm(**row.layers(1))
    compiled, counter = traced(model)
    position_ids = torch.cat([torch.arange(9), torch.arange(21)])[None]
    with torch.no_grad():
        found = compiled(tokens(1, 30), position_ids=position_ids, use_cache=False).logits
        torch.testing.assert_close(found, model(tokens(1, 30), position_ids=position_ids).logits, **CLOSE)
    assert counter.frame_count == 1


@in_every_run("leap", of=FIRST)
def test_lengths_do_not_recompile_for_ever(row):
    """The second length makes the length dynamic; no later one adds a graph, across the borders of the sums' chunks."""
    model = row.causal_lm(**row.layers(1))
    compiled, counter = traced(model)
    with torch.no_grad():
        for length in (70, 80, 130, 200):
            ids = tokens(2, length)
            torch.testing.assert_close(
                compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, **CLOSE
            )
    # DANet lays tokens out in chunks of its own, and has a graph for few and one for many of them.
    assert counter.frame_count == (3 if row.family == "danet" else 2)


@in_every_run("leap", "danet", of=TRACED_CAUSAL)
def test_training_step_is_one_graph(row):
    model = row.causal_lm(**row.layers(2)).train()
    compiled, counter = traced(model, "aot_eager")  # the backward is a graph, too
    ids = tokens(2, 30)
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **CLOSE)
    assert counter.frame_count == 1


def addresses(layer):
    """Where the tensors lie that a layer's steps write to."""
    held = [*layer.recurrent_states.values(), layer.cumulative_length, *vars(layer.past).values()]
    return [x.data_ptr() for x in held if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(
    ("padded", "given"),
    [
        pytest.param(False, (), id="full", marks=pytest.mark.slow),
        pytest.param(True, (), id="padded"),
        pytest.param(True, ("position_ids", "attention_mask"), id="padded-given"),
    ],
)
@in_every_run("leap", "fastformer", "danet", of=TRACED_CAUSAL)
def test_decoding_with_a_static_cache_is_one_graph(row, padded, given):
    """However many steps, and whatever they are given: nothing in the cache is a Python number that changes, or moves."""
    model = row.causal_lm(**row.layers(2))
    compiled, counter = traced(model.forward)
    _, _, ids, mask = padded_batch(LAYOUTS["left"], (9, 4))
    mask = mask if padded else None
    static, plain = StaticCache(config=model.config, max_cache_len=64), RecurrentCache(config=model.config)
    with torch.no_grad():
        for cache in (static, plain):
            model(ids, attention_mask=mask, cache=cache)
        places = addresses(static.layers[0])
        for step in range(6):
            token = tokens(2, 1, seed=step)
            now = {"position_ids": torch.tensor([[9], [4]]) + step, "attention_mask": torch.ones(2, 1).long()}
            now = {name: now[name] for name in given}
            found = compiled(token, cache=static, use_cache=True, **now).logits
            wanted = model(token, cache=plain, use_cache=True, **now).logits
            torch.testing.assert_close(found, wanted, **CLOSE)
    assert counter.frame_count == 1
    assert addresses(static.layers[0]) == places


@in_every_run("leap", of=FIRST)
def test_decoding_with_a_dynamic_cache_is_two_graphs(row):
    """The number of columns is a Python number there; after the second step it is a dynamic one."""
    model = row.causal_lm(**row.layers(1))
    compiled, counter = traced(model.forward)
    with torch.no_grad():
        cache = model(tokens(2, 9), use_cache=True).cache
        for step in range(6):
            compiled(tokens(2, 1, seed=step), cache=cache, use_cache=True)
    assert counter.frame_count <= 2


@pytest.mark.slow
@first_rows
def test_generated_code(row):
    """Once with the real compiler: forward and backward."""
    model = row.causal_lm(**row.layers(1)).train()
    compiled = torch.compile(model, fullgraph=True)
    ids = tokens(2, 70)
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3)


def exported(model, ids, mask, dynamic=None):
    """`model` as a program of two inputs."""

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(ids, attention_mask=mask, use_cache=False)[0]

    return torch.export.export(Logits(), (ids, mask), dynamic_shapes=dynamic).module()


@pytest.mark.slow  # below, the same with dynamic shapes
@traced_rows
def test_export_with_fixed_shapes(row):
    model = row.build("AutoModel", **row.layers(1))
    _, _, ids, mask = padded_batch(LAYOUTS["both"], (70, 23))
    program = exported(model, ids, mask)
    torch.testing.assert_close(program(ids, mask), model(ids, attention_mask=mask)[0], **CLOSE)


@in_every_run("leap", "danet-cosine", of=TRACED)
def test_export_with_dynamic_batch_and_length(row):
    model = row.build("AutoModel", **row.layers(2))
    _, _, ids, mask = padded_batch(LAYOUTS["both"], (70, 23))
    length = Dim("length", min=2, max=256)
    shape = {0: Dim("batch", min=1, max=64), 1: length}
    program = exported(model, ids, mask, {"ids": shape, "mask": shape})
    for batch, length in ((1, 5), (3, 64), (2, 65), (4, 200)):
        ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
        mask[0, : length // 3] = 0
        torch.testing.assert_close(program(ids, mask), model(ids, attention_mask=mask)[0], **CLOSE)
