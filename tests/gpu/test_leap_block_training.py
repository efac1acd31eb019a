"""A LEAP block in training, which keeps its input and its projections: outputs and all gradients against float64."""

import copy

import pytest
import torch
from gpu.device import DEVICE, DTYPES, assert_as_accurate, needs_gpu, needs_kernels, poison
from torch import nn

from hf_linear_attn import LeapBlock, LeapConfig
from hf_linear_attn.modeling.kernels.dispatch import use_backend
from hf_linear_attn.modeling.leap.kernels import block_training as leap_block_training

pytestmark = needs_kernels
WIDTH, HEADS = (256, 4) if DEVICE == "cuda" else (32, 2)


def make_block(window=None, **options):
    torch.manual_seed(0)
    config = LeapConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=1, layer_windows=[window], hidden_dropout_prob=0.0,
        **{"attention_dropout": 0.0, **options},
    )  # fmt: skip
    block = LeapBlock(config).to(DEVICE)
    for norm in (block.attention_norm, block.mlp_norm):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return block


def make_input(length=70, dtype=torch.float32):
    return torch.randn(2, length, WIDTH, device=DEVICE).to(dtype)


def run(block, backend, x, dtype, change=None, **arguments):
    block = copy.deepcopy(block).to(dtype)
    call = block if change is None else change(block)
    x = x.detach().clone().to(dtype).requires_grad_()
    poison(8 * x.numel())
    with use_backend(backend):
        out = call(x, **arguments)
        out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).to(dtype))
    return out.detach(), x.grad, *(p.grad for p in block.parameters() if p.requires_grad)


def compare(block, x, dtype, change=None, **arguments):
    block, x = block.to(dtype).float(), x.to(dtype).float()
    names = ("output", "input", *(name for name, p in block.named_parameters() if p.requires_grad))
    exact, plain = (run(block, "torch", x, d, **arguments) for d in (torch.float64, dtype))
    assert_as_accurate(run(block, "triton", x, dtype, change, **arguments), plain, exact, names)


@pytest.fixture
def steps(monkeypatch):
    """Counts the blocks that ran as one step after their projections."""
    calls, apply = [], leap_block_training._Rest.apply
    monkeypatch.setattr(leap_block_training._Rest, "apply", lambda *a: calls.append(1) or apply(*a))
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", ["whole", "recomputed", "packed", "padded", "rotary"])
@pytest.mark.interpreted("recomputed-4")
def test_block(kind, window, dtype, steps):
    block, x, arguments = make_block(window), make_input(), {}
    if kind == "recomputed":
        block = make_block(window, num_recomputed_mlps=1)
    elif kind == "packed":
        arguments["segment_ids"] = (torch.arange(70, device=DEVICE) // 13).expand(2, 70)
    elif kind == "padded":
        arguments["attention_mask"] = (torch.arange(70, device=DEVICE) > 6).expand(2, 70)
    elif kind == "rotary":
        block = make_block(window, position_embedding_type="rotary")
        arguments["position_ids"] = torch.arange(70, device=DEVICE)[None]
    compare(block, x, dtype, **arguments)
    assert bool(steps) == (kind in ("whole", "recomputed", "packed") or (kind == "padded" and window is None))


@needs_gpu
@pytest.mark.parametrize(("window", "recomputed"), [(None, 0), (4, 0), (40, 0), (4, 1)])
def test_compiled(window, recomputed):
    def compiled(block):
        return torch.compile(block, fullgraph=True)

    compare(make_block(window, num_recomputed_mlps=recomputed), make_input(1000), torch.bfloat16, compiled)


def test_frozen_layers_get_no_gradient(steps):
    block = make_block()
    for layer in (block.mlp.up_proj, block.attention.qfkv_proj, block.mlp_norm):
        layer.requires_grad_(False)
    compare(block, make_input(), torch.float32)
    assert steps


def test_gradient_checkpointing_forms_the_same():
    def checkpointed(block):
        return lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    compare(make_block(4), make_input(), torch.float32, checkpointed)


def test_dropout_is_the_same_in_backward(steps):
    """The gradient is that of the very entries that forward kept: a numerical derivative along one direction."""
    block, x = make_block(4, attention_dropout=0.3), make_input(40)
    direction = torch.randn_like(x)

    def loss(x):
        torch.manual_seed(3)
        with use_backend("triton"):
            return block(x).double().square().sum()

    x.requires_grad_()
    loss(x).backward()
    assert steps
    up, down = (loss((x + step * direction).detach().requires_grad_()).item() for step in (1e-2, -1e-2))
    derivative = (up - down) / 2e-2
    assert abs(derivative - (x.grad * direction).sum().item()) < 2e-2 * abs(derivative)


@needs_gpu
@pytest.mark.parametrize(("recomputed", "kept"), [(0, 9), (1, 5)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_it_keeps_nine_hidden_states(compiled, recomputed, kept):
    """Kept for backward: the input, four projections, and the four-fold inner activation where that is not formed again."""
    block = make_block(num_recomputed_mlps=recomputed).to(torch.bfloat16)
    x = make_input(4096, torch.bfloat16).requires_grad_()
    run = torch.compile(block) if compiled else block
    run(x).sum().backward()
    before = torch.cuda.memory_allocated()
    out = run(x)
    assert torch.cuda.memory_allocated() - before - out.nbytes <= (kept - 0.8) * x.nbytes  # the input was there before
