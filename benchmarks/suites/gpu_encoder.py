"""Encoders of about 335M parameters: forward, or forward and backward, of bodies in bfloat16 without a head.

131,072 tokens a batch (65,536 in training). Peers: the published DANet's block, and BERT-large with FlashAttention through
PyTorch's SDPA. Every block is compiled by itself, one graph shared by all blocks of a model; ours runs uncompiled, too.
"""

from functools import partial

import torch
from torch import nn
from transformers import BertConfig, BertModel

from hf_linear_attn import DanetConfig, DanetModel
from hf_linear_attn.modeling.backend import use_backend

from ..published_danet import PublishedDanet
from ..registry import Case, Work, device, relative_error

LENGTHS = (128, 1024, 16384, 131072)
TOKENS = {"encoder": 131072, "encoder-train": 65536}
WIDTH, LAYERS, VOCABULARY = 1024, 32, 30528
TFLOPS = 790  # a large bfloat16 product on an H200


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"unit": "ktokens_per_s", "tokens_a_batch": TOKENS[suite], "dtype": "bfloat16"}


def operations(length: int, folded: bool) -> float:
    """Multiplications and additions a token and forward of all blocks: of the published order, or of the order that we choose."""
    d = WIDTH
    published = 18 * d**2 + 4 * d * min(d, length)
    if not folded or length <= d:
        return LAYERS * published
    once = 2 * d**3 / length  # W^T (K^T V) of a row
    if length <= 4 * d:
        return LAYERS * (20 * d**2 + once)
    return LAYERS * (18 * d**2 + once + 8 * d**3 / length)


def danet(length: int, layers: int = LAYERS, mode: str = "auto"):
    """Our encoder."""
    config = DanetConfig.preset(
        "bert-large-128", max_position_embeddings=length, attention_mode=mode, num_hidden_layers=layers,
        vocab_size=VOCABULARY, hidden_size=WIDTH,
    )  # fmt: skip
    return DanetModel(config)


def published(length: int):
    """The peer with the same sizes."""
    return PublishedDanet(VOCABULARY, WIDTH, LAYERS, length)


def bert(length: int):
    """BERT-large."""
    size = {"hidden_size": WIDTH, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4 * WIDTH}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=length, attn_implementation="sdpa", **size, **drop
    )
    return BertModel(config, add_pooling_layer=False)


def blocks(model) -> nn.ModuleList:
    """The blocks of any of them."""
    return model.encoder.layer if isinstance(model, BertModel) else model.layers


def make(build, length: int, compiled: bool, training: bool, tokens: int) -> Work:
    """A model on the device and one pass over random tokens."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = build(length)
    model = model.to(torch.bfloat16).train(training)
    if compiled:
        for layer in blocks(model):
            layer.compile()
    ids = torch.randint(0, VOCABULARY, (max(1, tokens // length), length), device=device())

    @torch.inference_mode()
    def forward():
        model(ids)

    def both():
        model.zero_grad(set_to_none=True)
        out = model(ids)
        out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        out.float().square().mean().backward()

    return Work(both if training else forward, ids.numel(), {"parameters": sum(p.numel() for p in model.parameters())})


def check(length: int, compiled: bool, training: bool) -> tuple[float, float]:
    """Two of our layers against float32, beside the same layers in plain PyTorch: output, and a gradient in training."""
    torch.manual_seed(0)
    with torch.device(device()):
        model, plain = danet(length, 2), danet(length, 2, "linear" if length > WIDTH else "auto")
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(0, VOCABULARY, (1, length), device=device())

    def run(model, backend, dtype):
        model = model.to(dtype)
        with use_backend(backend), torch.set_grad_enabled(training):
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


def cases(suite: str, lengths: list[int]) -> list[Case]:
    """All contenders at all lengths."""
    training, tokens = suite == "encoder-train", TOKENS[suite]
    passes = 3 if training else 1
    made = []
    for length in lengths or LENGTHS:
        limit = TFLOPS * 1e9 / passes
        ours, theirs = limit / operations(length, True), limit / operations(length, False)
        for name, compiled in (("DANet, ours", False), ("DANet, ours, compiled blocks", True)):
            work = partial(make, danet, length, compiled, training, tokens)
            made.append(Case(name, length, work, partial(check, length, compiled, training), ours))
        work = partial(make, published, length, True, training, tokens)
        made.append(Case("DANet, published block, compiled", length, work, limit=theirs))
        work = partial(make, bert, length, True, training, tokens)
        made.append(Case("BERT, FlashAttention, compiled", length, work))
    return made
