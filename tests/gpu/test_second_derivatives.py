"""Gradient penalties through the kernels' layers equal those of plain PyTorch in float64."""

import pytest
import torch
from gpu.device import DEVICE, needs_kernels

from hf_linear_attn import DanetConfig, DanetModel, LeapConfig, LeapModel
from hf_linear_attn.modeling.kernels.dispatch import use_backend
from hf_linear_attn.modeling.sea.attention import SeaAttentionCore, SeaOptions

pytestmark = needs_kernels
SIZE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "hidden_dropout_prob": 0.0,
}


def leap(**options):
    return LeapModel(LeapConfig(**SIZE, layer_windows=[None, 4], initializer_range=0.3, **options))


def danet(**options):
    return DanetModel(DanetConfig(**SIZE, initializer_range=0.3, embedding_dropout=0.0, **options))


# name -> the model, whether its rows are padded, the steps that it must go through
MODELS = {
    "blocks of LEAP": (leap, True, ["_Rest", "_NormedLinear", "gelu_linear", "leap_forward"]),
    "mechanism of LEAP": (lambda: leap(position_embedding_type="rotary"), False, ["leap_forward"]),
    "stream of DANet": (
        lambda: danet(is_causal=True, layer_pattern="g_sw", window_size=4, scale_length=16),
        False,
        ["_BetweenBlocks", "max_norm", "causal_bilinear"],
    ),
    "padded stream of DANet": (
        lambda: danet(is_causal=True, layer_pattern="g_sw", window_size=4, scale_length=16),
        True,
        ["_BetweenBlocks"],
    ),
}


def steps_behind(tensor) -> str:
    """The names of all nodes of its graph."""
    found, left = {}, [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found[node] = node.name()
            left += [following for following, _ in node.next_functions]
    return " ".join(found.values())


def penalty_gradients(run, leaves, parameters):
    first = torch.autograd.grad(run().sin().sum(), leaves, create_graph=True)
    return torch.autograd.grad(
        sum(x.square().sum() for x in first), parameters, allow_unused=True, materialize_grads=True
    )


def assert_close(found, wanted):
    for ours, exact in zip(found, wanted, strict=True):
        scale = max(1.0, exact.abs().max().item())
        torch.testing.assert_close(ours.double(), exact, atol=2e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.interpreted("blocks of LEAP|stream of DANet")
def test_models(name):
    make, padded, steps = MODELS[name]
    torch.manual_seed(0)
    model = make().to(DEVICE).train()
    embeds = torch.randn(2, 7, 16, device=DEVICE)
    mask = torch.ones(2, 7, dtype=torch.long, device=DEVICE)
    if padded:
        mask[0, 5:] = 0

    def gradients(dtype, backend):
        inputs = embeds.detach().to(dtype).requires_grad_()
        model.to(dtype)

        def run():
            return model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state

        with use_backend(backend):
            return penalty_gradients(run, [inputs], list(model.parameters()))

    wanted = gradients(torch.float64, "torch")
    assert_close(gradients(torch.float32, "triton"), wanted)
    with use_backend("triton"):
        behind = steps_behind(model(inputs_embeds=embeds.requires_grad_(), attention_mask=mask).last_hidden_state)
    assert all(step in behind for step in steps), behind


@pytest.mark.interpreted
def test_sea_layer():
    """Kernel attention, narrow norms and attention on the kept keys."""
    torch.manual_seed(0)
    core = SeaAttentionCore(SeaOptions(2, 8, True, 4, 8, max_positions=32, backend="chunked")).to(DEVICE)
    tensors = [torch.randn(1, 2, 9, 8, device=DEVICE) for _ in range(3)]

    def gradients(dtype, backend):
        inputs = [x.detach().to(dtype).requires_grad_() for x in tensors]
        core.to(dtype)
        with use_backend(backend):
            return penalty_gradients(lambda: core(*inputs).context, inputs, [*inputs, *core.parameters()])

    wanted = gradients(torch.float64, "torch")
    assert_close(gradients(torch.float32, "triton"), wanted)


@pytest.mark.interpreted
def test_dropped_entries_are_refused():
    """The kernel draws them for first derivatives alone."""
    model = leap(attention_dropout=0.5).to(DEVICE).train()
    embeds = torch.randn(1, 6, 16, device=DEVICE).requires_grad_()
    with use_backend("triton"):
        hidden = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        with pytest.raises(RuntimeError, match="Set `attention_dropout` to 0"):
            torch.autograd.grad(hidden.sum(), embeds, create_graph=True)
