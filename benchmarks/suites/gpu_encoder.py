"""Encoders of about 335M or 30M parameters: forward, or forward and backward, of bodies in bfloat16 without a head.

131,072 tokens a batch (65,536 in training, or one row if it is longer). Peers: the published DANet's block, BERT with
FlashAttention through PyTorch's SDPA, and BERT with softmax replaced by plain linear attention (1 + elu). Every block is compiled
by itself, one graph shared by all blocks of a model; ours runs uncompiled, too.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import BertConfig, BertModel

from hf_linear_attn import DanetConfig, DanetModel

from ..harness import Case, Work, device, relative_error
from ..peers import PublishedDanet
from ..private import private
from .danet import linear_attention  # noqa: F401  (registers the attention "elu_linear_attention")

LENGTHS = (128, 1024, 16384, 131072)
TFLOPS = 790  # a large bfloat16 product on an H200


@dataclass(frozen=True)
class Size:
    """Width, and layers of DANet and BERT for the same number of parameters (9 d^2 and 12 d^2 a layer); heads of BERT."""

    width: int
    layers: int
    bert_layers: int
    bert_heads: int
    tokens: int = 131072  # a batch; half of them in training
    vocabulary: int = 30528


LARGE, SMALL, QUICK = Size(1024, 32, 24, 16), Size(384, 13, 10, 6), Size(16, 2, 2, 2, 48, 50)


def size_of(suite: str) -> Size:
    """The size that a suite's name tells."""
    return SMALL if suite.endswith("-30m") else LARGE


def trains(suite: str) -> bool:
    """Whether a suite measures forward and backward."""
    return "-train" in suite


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    tokens = size_of(suite).tokens // (2 if trains(suite) else 1)
    return {"unit": "ktokens_per_s", "tokens_a_batch": tokens, "dtype": "bfloat16"}


def operations(size: Size, length: int, folded: bool) -> float:
    """Multiplications and additions a token and forward of all blocks: of the published order, or of the order that we choose."""
    d = size.width
    published = 18 * d**2 + 4 * d * min(d, length)
    if not folded or length <= d:
        return size.layers * published
    once = 2 * d**3 / length  # W^T (K^T V) of a row
    if length <= 4 * d:
        return size.layers * (20 * d**2 + once)
    return size.layers * (18 * d**2 + once + 8 * d**3 / length)


def danet(size: Size, length: int, mode: str = "auto", layers: int | None = None):
    """Our encoder."""
    config = DanetConfig.preset(
        "bert-large-128", max_position_embeddings=length, attention_mode=mode, num_hidden_layers=layers or size.layers,
        vocab_size=size.vocabulary, hidden_size=size.width,
    )  # fmt: skip
    return DanetModel(config)


def published(size: Size, length: int):
    """The peer with the same sizes."""
    return PublishedDanet(size.vocabulary, size.width, size.layers, length)


def bert(size: Size, length: int, attention: str = "sdpa"):
    """BERT with one of Transformers' attention functions."""
    sizes = {"hidden_size": size.width, "num_hidden_layers": size.bert_layers, "intermediate_size": 4 * size.width}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(
        vocab_size=size.vocabulary, num_attention_heads=size.bert_heads, max_position_embeddings=length,
        attn_implementation=attention, **sizes, **drop,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def blocks(model) -> nn.ModuleList:
    """The blocks of any of them."""
    return model.encoder.layer if isinstance(model, BertModel) else model.layers


def make(build, size: Size, length: int, compiled: bool, training: bool) -> Work:
    """A model on the device and one pass over random tokens."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = build(size, length)
    model = model.to(torch.bfloat16).train(training)
    if compiled:
        for layer in blocks(model):
            layer.compile()
    tokens = size.tokens // 2 if training else size.tokens
    ids = torch.randint(0, size.vocabulary, (max(1, tokens // length), length), device=device())

    @torch.inference_mode()
    def forward():
        model(ids)

    def both():
        model.zero_grad(set_to_none=True)
        out = model(ids)
        out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        out.float().square().mean().backward()

    return Work(both if training else forward, ids.numel(), {"parameters": sum(p.numel() for p in model.parameters())})


def check(size: Size, length: int, compiled: bool, training: bool) -> tuple[float, float]:
    """Two of our layers against float32, beside the same layers in plain PyTorch: output, and a gradient in training."""
    torch.manual_seed(0)
    with torch.device(device()):
        mode = "linear" if length > size.width else "auto"
        model, plain = danet(size, length, layers=2), danet(size, length, mode, layers=2)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(0, size.vocabulary, (1, length), device=device())

    def run(model, backend, dtype):
        model = model.to(dtype)
        with private("use_backend")(backend), torch.set_grad_enabled(training):
            out = model(ids).last_hidden_state
            if not training:
                return out
            model.zero_grad()
            out.float().square().mean().backward()
            return torch.cat([p.grad.flatten().float() for p in (model.layers[0].mlp.down_proj.weight,)])

    exact = run(plain, "torch", torch.float32).float()
    same = run(plain, "torch", torch.bfloat16)
    if compiled:
        for layer in model.layers:
            layer.compile()
    return relative_error(run(model, "auto", torch.bfloat16), exact), 2 * relative_error(same, exact) + 1e-6


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """All contenders at all lengths."""
    size, training = QUICK if quick else size_of(suite), trains(suite)
    peers = {
        "DANet, published block, compiled": published,
        "BERT, FlashAttention, compiled": bert,
        "linear attention (1 + elu), compiled": partial(bert, attention="elu_linear_attention"),
    }
    made = []
    for length in lengths or ([12] if quick else LENGTHS):
        limit = TFLOPS * 1e9 / (3 if training else 1)
        ours, theirs = limit / operations(size, length, True), limit / operations(size, length, False)
        for name, compiled in (("DANet, ours", False), ("DANet, ours, compiled blocks", True)):
            work = partial(make, danet, size, length, compiled, training)
            made.append(Case(name, length, work, partial(check, size, length, compiled, training), ours))
        for name, build in peers.items():
            work = partial(make, build, size, length, True, training)
            made.append(Case(name, length, work, limit=theirs if build is published else None))
    return made
