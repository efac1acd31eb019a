"""Decoding on a GPU: the fused steps of LEAP and DANet and the CUDA graph of generate() against the plain step."""

import pytest
import torch
from gpu.device import DEVICE, DTYPES, HAS_GPU, assert_as_accurate, needs_gpu, needs_kernels, poison, sizes
from transformers import StaticCache

from hf_linear_attn import (
    DanetConfig,
    DanetForCausalLM,
    FastformerConfig,
    FastformerForCausalLM,
    LeapConfig,
    LeapForCausalLM,
    RecurrentCache,
)
from hf_linear_attn.modeling.kernels.dispatch import use_backend
from hf_linear_attn.modeling.kernels.fast_paths import recorded_choices

pytestmark = needs_kernels
LAYERS = [(1, 16, 50), (16, 768, 3072), (16, 3072, 768), (16, 4000, 50257), (9, 5000, 768)]  # rows, depth, columns
START = 7 if HAS_GPU else 11  # of 12 tokens, the first that is decoded; a step takes seconds in the interpreter
SIZE = {"vocab_size": 50, "num_hidden_layers": 4, "max_position_embeddings": 40}


def build(family=LeapForCausalLM, config=LeapConfig, width=48, heads=2, **options):
    torch.manual_seed(0)
    model = family(config(**SIZE, hidden_size=width, num_attention_heads=heads, **options)).to(DEVICE).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def decode(model, ids, backend, dtype, static):
    """Logits of the tokens from START on, one by one, and what the cache holds then."""
    model = model.to(dtype)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else RecurrentCache(config=model.config)
    with use_backend("torch"):
        model(ids[:, :START], cache=cache, use_cache=True)
    with use_backend(backend):
        steps = [model(x, cache=cache, use_cache=True).logits for x in ids[:, START:].split(1, dim=1)]
    held = torch.cat([x.double().flatten() for layer in cache.layers for x in layer.saved_tensors().values()])
    return [torch.cat(steps, dim=1), held], [int(layer.get_seq_length()) for layer in cache.layers]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize(
    "sizes", sizes([(48, 2, 3)], [(128, 2, 1), (200, 2, 16), (768, 12, 16), (768, 12, 40)]), ids=str
)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.interpreted("True-.*-rotary")
def test_fused_step(static, sizes, positions, dtype, monkeypatch):
    """Windows global, 1 (no state but itself), 4 and 8: logits, states, counts and lengths."""
    width, heads, batch = sizes
    model = build(width=width, heads=heads, position_embedding_type=positions, layer_windows=[None, 1, 4, 8])
    ids = torch.randint(0, 50, (batch, 12), device=DEVICE)
    from hf_linear_attn.modeling.leap.kernels import block_step as leap_step

    calls = []
    run = leap_step.step_kernels
    monkeypatch.setattr(leap_step, "step_kernels", lambda *a: calls.append(1) or run(*a))
    exact, lengths = decode(model, ids, "torch", torch.float64, static)
    plain, _ = decode(model, ids, "torch", dtype, static)
    assert not calls
    poison(ids.numel() * width)
    ours, found = decode(model, ids, "triton", dtype, static)
    assert len(calls) == (12 - START) * 4
    assert found == lengths == [12] * 4
    assert_as_accurate(ours, plain, exact, ("logits", "states"))


@torch.no_grad()
@pytest.mark.parametrize("position", [10**6, 10**7])
@pytest.mark.interpreted
def test_a_step_turns_by_exact_angles_far_out(position):
    """Queries and keys of the fused step at large positions: within float32 of the layer in float64."""
    from hf_linear_attn.modeling.leap.kernels.block_step import _mix

    attention = build(position_embedding_type="rotary", layer_windows=[4] * 4).model.layers[0].attention
    hidden, state = torch.randn(1, 1, 48, device=DEVICE), [torch.randn(1, 3, 2, 2, 24), torch.rand(1, 3, 2)]
    state, positions = [x.to(DEVICE) for x in state], torch.tensor([[position]], device=DEVICE)
    wanted = attention.double()(hidden.double(), position_ids=positions, state=[x.double() for x in state])
    projected, counts = attention.float().qfkv_proj(hidden)[:, 0], torch.full((1,), position, device=DEVICE)
    found = _mix(attention, projected, torch.zeros_like(hidden[:, 0]), positions, state, counts, None)
    torch.testing.assert_close(found.double(), wanted.hidden_states[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", ["learned", "rotary", "cosine"])
@pytest.mark.parametrize("pattern", ["g_sw", "l_sl"])
@pytest.mark.parametrize(
    "sizes", sizes([(48, 2, 3)], [(128, 2, 1), (200, 2, 16), (768, 12, 16), (256, 1, 40)]), ids=str
)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.interpreted("True-.*-g_sw-rotary")
def test_danet_step(static, sizes, pattern, positions, dtype, monkeypatch):
    """Memories of rows and of windows that end meanwhile, rings: logits, states, counts and lengths."""
    width, heads, batch = sizes
    options = {"layer_pattern": pattern, "window_size": 4, "is_causal": True, "scale_mode": "fixed"}
    model = build(DanetForCausalLM, DanetConfig, width, heads, position_embedding_type=positions, **options)
    ids = torch.randint(0, 50, (batch, 12), device=DEVICE)
    from hf_linear_attn.modeling.danet.kernels import attention_step

    calls = []
    run = attention_step.step_kernel
    monkeypatch.setattr(attention_step, "step_kernel", lambda *a: calls.append(1) or run(*a))
    exact, lengths = decode(model, ids, "torch", torch.float64, static)
    plain, _ = decode(model, ids, "torch", dtype, static)
    assert not calls
    poison(ids.numel() * width)
    ours, found = decode(model, ids, "triton", dtype, static)
    assert len(calls) == (12 - START) * 4
    assert found == lengths == [12] * 4
    assert_as_accurate(ours, plain, exact, ("logits", "states"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", sizes([(3, 40, 70)], [(1, 16, 50), (16, 768, 3072), (16, 3072, 768), (16, 4000, 50257), (9, 5000, 768)])
)
@pytest.mark.parametrize("around", ["", "norm", "gelu", "relu", "residual"])
@pytest.mark.interpreted
def test_linear_layer_on_one_token(around, size, dtype, monkeypatch):
    """Whole weights at once (in small pieces on a CPU), each part around the product, values that the allocator left."""
    from hf_linear_attn.modeling.kernels import step_linear as module

    if DEVICE == "cpu":
        monkeypatch.setattr(module, "WHOLE_DTYPES", DTYPES)
        monkeypatch.setattr(module, "WHOLE_DEPTH", 64 if around == "norm" else 16)
    rows, depth, columns = size
    torch.manual_seed(0)
    linear, norm = torch.nn.Linear(depth, columns).to(DEVICE), torch.nn.LayerNorm(depth).to(DEVICE)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(rows, depth, device=DEVICE), torch.randn(rows, columns, device=DEVICE)
    linear, norm, x, residual = (y.to(dtype).float() for y in (linear, norm, x, residual))

    def plain(dtype):
        given, added = x.to(dtype), residual.to(dtype)
        out = linear.to(dtype)(norm.to(dtype)(given) if around == "norm" else given)
        out = torch.nn.functional.gelu(out) if around == "gelu" else out.relu() if around == "relu" else out
        return out + added if around == "residual" else out

    exact, same = plain(torch.float64), plain(dtype)
    poison(4 * residual.numel())
    options = {"norm": norm if around == "norm" else None, "gelu": around == "gelu", "relu": around == "relu"}
    for _ in range(3):  # pieces are counted anew each time
        added = residual.to(dtype) if around == "residual" else None
        ours = module.project(x.to(dtype), linear, residual=added, **options)
        assert_as_accurate([ours], [same], [exact], ("output",))


@pytest.mark.parametrize("what", ["padding", "focus weights", "hook", "past recording", "gradients"])
def test_steps_that_the_kernels_leave_to_pytorch(what, monkeypatch):
    model = build()
    ids = torch.randint(0, 50, (2, 9), device=DEVICE)
    kernels = "hf_linear_attn.modeling.leap.kernels.block_step.step_kernels"
    monkeypatch.setattr(kernels, lambda *a: pytest.fail("the kernels ran"))
    cache, options = RecurrentCache(config=model.config), {}
    if what == "padding":
        options["attention_mask"] = torch.tensor([[1], [0]], device=DEVICE)
    elif what == "focus weights":
        options["output_focus_weights"] = True
    elif what == "hook":
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda *a: None)
    elif what == "past recording":
        cache.activate_past_recording()
    with use_backend("torch"):
        model(ids[:, :8], cache=cache, use_cache=True)
    with torch.set_grad_enabled(what == "gradients"):
        if DEVICE == "cuda":
            model(ids[:, 8:], cache=cache, use_cache=True, **options)
        else:
            with recorded_choices() as choices:
                model(ids[:, 8:], cache=cache, use_cache=True, **options)
            device = "it runs on CUDA devices, the input is on cpu"
            reasons = [
                x.reasons["one decoding step in four kernels"] for x in choices if x.function == "LeapBlock.forward"
            ]
            assert len(reasons) == 4
            assert all(reason.removeprefix(device) for reason in reasons), "nothing but the device speaks against it"


FAMILIES = {
    "leap": (LeapForCausalLM, LeapConfig, {}),
    "leap rotary": (LeapForCausalLM, LeapConfig, {"position_embedding_type": "rotary"}),
    "danet": (DanetForCausalLM, DanetConfig, {"is_causal": True, "layer_pattern": "g_sw", "window_size": 4}),
    "fastformer": (FastformerForCausalLM, FastformerConfig, {}),
}


@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_with_a_graph(family, cache, monkeypatch):
    """The same tokens as without one, for prompts with and without padding, and a second call with another batch."""
    make, config, options = FAMILIES[family]
    model = build(make, config, **options)
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: replays.append(1) or replay(self))
    for batch, padded in ((2, False), (3, True)):
        ids = torch.randint(1, 50, (batch, 9), device=DEVICE)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :3] = 0
        common = {
            "attention_mask": mask,
            "max_new_tokens": 20,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        common |= {"cache_implementation": cache, "return_dict_in_generate": True, "output_logits": True}
        replays.clear()
        with_graph = model.generate(ids, **common)
        assert len(replays) == 18  # prefill gives one token, the first step runs plainly
        without = model.generate(ids, disable_compile=True, **common)
        assert len(replays) == 18
        assert with_graph.sequences.tolist() == without.sequences.tolist()
        torch.testing.assert_close(torch.stack(with_graph.logits), torch.stack(without.logits))
        lengths = [int(x.cache.get_seq_length()) for x in (with_graph, without)]
        assert lengths[0] == lengths[1] == 9 + 19


@needs_gpu
def test_a_graph_ends_with_the_learned_positions():
    model = build(position_embedding_type="learned")
    ids = torch.randint(1, 50, (1, 30), device=DEVICE)
    with pytest.raises(ValueError, match="learned positions 0 to 39"):
        model.generate(ids, max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None)


class WaitsForTheGpu(torch.nn.LayerNorm):
    """A layer that looks at its numbers, which a recording cannot."""

    def forward(self, x):
        out = super().forward(x)
        assert float(out.sum()) == float(out.sum())
        return out


@needs_gpu
def test_hooks_are_called_at_every_step():
    """A replayed step calls no layer, so a model with hooks is not recorded."""
    model, seen = build(), []
    ids = torch.randint(1, 50, (1, 5), device=DEVICE)
    model.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(1))
    model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert len(seen) == 8


@needs_gpu
def test_a_step_that_cannot_be_recorded_runs_anyway():
    model = build()
    ids = torch.randint(1, 50, (1, 5), device=DEVICE)
    common = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, disable_compile=True, **common)
    model.model.norm.__class__ = WaitsForTheGpu
    with pytest.warns(UserWarning, match="cannot be recorded"):
        assert model.generate(ids, **common).tolist() == expected.tolist()
    torch.randn(3, device=DEVICE)  # the generator of random numbers does not wait for the end of the recording


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("given", [False, True], ids=["alone", "given"])
@pytest.mark.parametrize("family", ["leap", "danet"])
def test_a_compiled_step_is_a_graph(family, given):
    """Mode "reduce-overhead" over a static cache: all that a step writes lies at one address, also with a caller's positions."""
    options = {"position_embedding_type": "rotary"}
    if family == "danet":
        options |= {"layer_pattern": "g_sw", "window_size": 4, "is_causal": True, "scale_mode": "fixed"}
    classes = (LeapForCausalLM, LeapConfig) if family == "leap" else (DanetForCausalLM, DanetConfig)
    model = build(*classes, **options)
    ids = torch.randint(0, 50, (2, 16), device=DEVICE)
    static, plain = StaticCache(config=model.config, max_cache_len=40), RecurrentCache(config=model.config)
    for cache in (static, plain):
        model(ids[:, :6], cache=cache, use_cache=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for column in range(6, 16):
        step = {"input_ids": ids[:, column : column + 1], "use_cache": True}
        if given:
            step["position_ids"] = torch.full((2, 1), column, device=DEVICE)
            step["attention_mask"] = torch.ones(2, 1, dtype=torch.long, device=DEVICE)
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(cache=static, **step).logits.clone()
        torch.testing.assert_close(found, model(cache=plain, **step).logits, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
