"""DANet's fused passes against float64: MaxNorm with scale and residual, ReLU inside a product, products folded for a row."""

import pytest
import torch
from gpu.device import DEVICE, DTYPES, assert_as_accurate, needs_gpu, needs_kernels, poison, sizes

from hf_linear_attn import DanetConfig, DanetModel
from hf_linear_attn.modeling.danet.kernels import relu_feed_forward as relu_feed_forward_module
from hf_linear_attn.modeling.danet.kernels.gram import gram, with_transpose
from hf_linear_attn.modeling.danet.kernels.relu_feed_forward import masked_product, relu_feed_forward, relu_product
from hf_linear_attn.modeling.danet.kernels.self_attention import self_attention
from hf_linear_attn.modeling.danet.norms import VectorNorm
from hf_linear_attn.modeling.kernels.dispatch import use_backend
from hf_linear_attn.modeling.kernels.fast_paths import recorded_choices

pytestmark = [*needs_kernels, pytest.mark.interpreted]


def normalise(backend, y, scale, residual):
    y = y.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    poison(2 * y.numel())
    with use_backend(backend):
        out = VectorNorm(y.shape[-1], 1e-3)(y, scale, residual)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    return [out.detach(), y.grad] + ([] if residual is None else [residual.grad])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("width", sizes([16, 60], [100, 768, 1024, 5000]))
def test_max_norm(width, with_residual, with_scale, dtype):
    generator = torch.Generator().manual_seed(width)
    y = torch.randn(3, 7, width, generator=generator).to(DEVICE, dtype)
    y[0, 0] = 0  # a padded row
    y[1, 1, :3] = 2 * y[1, 1].abs().max()  # equal maxima share the gradient
    y[1, 2, :3] = 2 * y[1, 2].abs().max()
    y[1, 2, 3:5] = -y[1, 2, 0]  # and of both signs
    scale = torch.rand(3, 7, 1, generator=generator).to(DEVICE) if with_scale else None
    if with_scale:
        scale[0, 0] = 0
    residual = torch.randn(3, 7, width, generator=generator).to(DEVICE, dtype) if with_residual else None
    exact = normalise("torch", y.double(), scale, None if residual is None else residual.double())
    names = ("output", "gradient", "residual gradient")
    assert_as_accurate(normalise("triton", y, scale, residual), normalise("torch", y, scale, residual), exact, names)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("length", [1, 15, 500])
def test_relu_in_the_product(length, batched, dtype):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 64, generator=generator).to(DEVICE, dtype)
    matrix = torch.randn(*((2,) if batched else ()), 64, 200, generator=generator).to(DEVICE, dtype)

    def run(backend, x, matrix):
        x, matrix = x.detach().requires_grad_(), matrix.detach().requires_grad_()
        with use_backend(backend):
            out = relu_product(x, matrix)
        out.square().sum().backward()
        return out.detach(), x.grad, matrix.grad

    exact = run("torch", x.double(), matrix.double())
    assert_as_accurate(run("auto", x, matrix), run("torch", x, matrix), exact, ("output", "gradient", "of the matrix"))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ffn_type", ["relu", "swiglu"])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("length", [100, 300, 1500])
def test_a_model_whose_products_are_folded(length, heads, ffn_type, dtype):
    """Of six models together: an element that is the largest of its row, or about 0 before a ReLU, decides much in one."""
    found = [run_folded_and_plain(seed, length, heads, ffn_type, dtype) for seed in range(6)]
    assert_as_accurate(*([torch.cat(x) for x in zip(*results)] for results in zip(*found)), ("output", "gradient"))


def run_folded_and_plain(seed, length, heads, ffn_type, dtype):
    """Outputs and a gradient: ours, plain PyTorch in the same dtype, and in float64."""
    sizes = {"vocab_size": 50, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": heads}
    config = {**sizes, "position_embedding_type": "learned", "max_position_embeddings": length, "ffn_type": ffn_type}
    torch.manual_seed(seed)
    folded = DanetModel(DanetConfig(**config)).to(DEVICE).eval()
    plain = DanetModel(DanetConfig(**config, attention_mode="linear")).to(DEVICE).eval()
    plain.load_state_dict(folded.state_dict())
    ids = torch.randint(0, 50, (2, length), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0

    def run(model, backend, dtype):
        model = model.to(dtype)
        model.zero_grad()
        with use_backend(backend):
            out = model(ids, attention_mask=mask).last_hidden_state
        loss = (out.double().square() * mask[..., None]).sum() / 64  # a sum over all tokens would leave float16
        loss.backward()
        return (out.detach() * mask[..., None]).flatten(), model.layers[0].mlp.down_proj.weight.grad.flatten().clone()

    return run(folded, "auto", dtype), run(plain, "torch", dtype), run(plain, "torch", torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["max_norm", "fixed_max_norm"])
@pytest.mark.interpreted("max_norm-(False-False|True-True)")
def test_norms_between_blocks_in_one_pass(norm, training, padded, dtype):
    """The stream runs from block to block: the same hidden states and (in float32) gradients as block by block.

    In half precision the gradient of a model hangs on which of two nearly equal entries rounding makes the largest of its row:
    for that see the next test.
    """
    training = training and dtype == torch.float32
    config = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "position_embedding_type": "learned"}
    config |= {"hidden_dropout_prob": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    torch.manual_seed(0)
    model = DanetModel(DanetConfig(**config, pre_norm=norm, post_norm=norm, max_position_embeddings=12)).to(DEVICE)
    ids, mask = torch.randint(0, 50, (2, 12), device=DEVICE), None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, 3:5] = 0

    def go(dtype, backend):
        typed = model.to(dtype)
        typed.zero_grad()
        poison(10_000)
        with use_backend(backend), torch.set_grad_enabled(training), recorded_choices() as choices:
            out = typed(ids, attention_mask=mask).last_hidden_state
        assert ("norms between blocks in one pass" in [x.path for x in choices]) == (backend == "triton")
        if not training:
            return [out]
        (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum().backward()
        return [out.detach(), *(p.grad.clone() for p in typed.parameters())]

    exact, plain, ours = go(torch.float64, "torch"), go(dtype, "torch"), go(dtype, "triton")
    assert_as_accurate(ours, plain, exact, ("hidden states", *(name for name, _ in model.named_parameters())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("width", sizes([60], [1000]))
def test_two_steps_of_the_stream(width, lazy, dtype):
    """Two ends of blocks, one after the other: what they give, and the gradients of what blocks add and of the stream."""
    from hf_linear_attn.modeling.danet.kernels.between_blocks import between_blocks, leave_stream

    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(2, 7, width, generator=generator).to(DEVICE, dtype) for _ in range(6)]
    scale = torch.rand(2, 7, 1, generator=generator).to(DEVICE) + 0.5
    keep = None if lazy else (torch.rand(2, 7, 1, generator=generator) > 0.3).float().to(DEVICE)
    norm = VectorNorm(width, 1e-3)

    def run(kind, ours):
        first, second, hidden, *grads = (x.detach().clone().to(kind).requires_grad_() for x in draw)
        poison(8 * hidden.numel())
        if ours:
            x, stream, factor = between_blocks(first, hidden, None, keep, scale, 1e-3, 1e-3, lazy)
            y, stream, factor = between_blocks(second, stream, factor, keep, scale, 1e-3, 1e-3, lazy)
            found = [x, y, leave_stream(stream, factor)]
        else:
            with use_backend("torch"):
                between = norm(first, keep, hidden)
                last = norm(second, keep, between)
                found = [norm(between, scale), norm(last, scale), last]
        sum((a * b.detach()).sum() for a, b in zip(found, grads)).backward()
        return [x.detach() for x in found] + [first.grad, second.grad, hidden.grad]

    names = ("x", "next x", "hidden states", "of the first block", "of the second", "of the stream")
    assert_as_accurate(run(dtype, True), run(dtype, False), run(torch.float64, False), names)


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [64, 1024, 16384])
def test_gram(length, dtype):
    x = torch.randn(2, 1, length, 512, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    poison(x.numel())
    with use_backend("triton"):
        ours = gram(x)
    with use_backend("torch"):
        plain, exact = gram(x), gram(x.double())
    assert_as_accurate([ours], [plain], [exact], ("X^T X",))


@needs_gpu
def test_gram_gradient():
    x = torch.randn(2, 1, 256, 512, device=DEVICE, dtype=torch.bfloat16)
    grads = []
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float64)):
        y = x.detach().clone().to(dtype).requires_grad_()
        with use_backend(backend):
            gram(y).square().sum().backward()
        grads.append([y.grad])
    assert_as_accurate(*grads, ("gradient",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", sizes([20, 70], [1024]))
def test_sum_with_transpose(width, dtype):
    matrix = torch.randn(2, width, width, device=DEVICE).to(dtype)
    wanted = matrix + matrix.mT
    with use_backend("triton"):
        assert torch.equal(with_transpose(matrix), wanted)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("length", [1, 65, 512])
def test_self_attention_and_gradients(length, linear, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(2, length, 512, device=DEVICE), torch.randn(512, 512, device=DEVICE)
    found = []
    for function, kind in (("ours", dtype), ("plain", dtype), ("plain", torch.float64)):
        a, w = ((0.1 * t).to(dtype).to(kind).clone().requires_grad_() for t in (x, weight))
        if function == "ours":
            poison(a.numel())
            out = self_attention(a, w, linear)
        else:
            query = a @ w.t()
            out = query @ (a.mT @ a) if linear else (query @ a.mT) @ a
        out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).to(kind))
        found.append((out.detach(), a.grad, w.grad))
    assert_as_accurate(*found, ("output", "input", "weight"))


HALF = sizes([torch.float16], [torch.bfloat16])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", sizes([(130, 64, 256)], [(4099, 1024, 4096), (65536, 128, 512)]), ids=str)
def test_product_masked_by_an_activation(shape, dtype, monkeypatch):
    monkeypatch.setattr(relu_feed_forward_module, "FEWEST_ROWS", 1)
    rows, depth, columns = shape
    torch.manual_seed(0)
    grad, weight = (
        torch.randn(rows, depth, device=DEVICE).to(dtype),
        torch.randn(depth, columns, device=DEVICE).to(dtype),
    )
    active = torch.randn(rows, columns, device=DEVICE).relu().to(dtype)
    found = []
    for backend, kind in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        poison(active.numel())
        with use_backend(backend):
            found.append([masked_product(grad.to(kind), weight.to(kind), active.to(kind))])
    assert_as_accurate(*found, ("gradient",))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("length", [15, 5000])
def test_relu_feed_forward(length, batched, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, length, 64, device=DEVICE)
    matrix, down = torch.randn(*((2,) if batched else ()), 64, 256, device=DEVICE), torch.randn(64, 256, device=DEVICE)
    found = []
    for backend, kind in (("auto", dtype), ("torch", dtype), ("torch", torch.float64)):
        layer = torch.nn.Linear(256, 64, bias=False, device=DEVICE, dtype=kind)
        layer.weight.data.copy_(down.to(dtype))
        a, m = (t.to(dtype).to(kind).detach().clone().requires_grad_() for t in (x, matrix))
        poison(8 * a.numel())
        with use_backend(backend):
            out = relu_feed_forward(a, m, layer)
            out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).to(kind))
        found.append([out.detach(), a.grad, m.grad, layer.weight.grad])
    assert_as_accurate(*found, ("output", "input", "matrix", "weight"))
