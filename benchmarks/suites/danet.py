r"""DANet encoders against BERT (Transformers, SDPA) and a plain linear-attention encoder of as many parameters.

The sizes are BERT's. A DANet block has 9 d^2 weights and a BERT block 12 d^2, so DANet is 4/3 as deep. All have learned
positions, compute without dropout and return hidden states. The linear-attention encoder is BERT with softmax
replaced by the 1 + elu feature map. "By operations" is what the operations of the blocks' matrix products alone would give.
"""

from dataclasses import asdict, dataclass
from functools import partial

import torch
from transformers import AttentionInterface, BertConfig, BertModel

from hf_linear_attn import DanetConfig, DanetModel

from ..harness import Case, Work

LENGTHS = (128, 1024, 4096, 16384)


@dataclass(frozen=True)
class Size:
    """Of BERT. slices: models are built with this part of the depth, and a run of it counts as many tokens less."""

    width: int
    layers: int
    heads: int
    vocabulary: int = 30528
    slices: int = 1
    tokens: int = 1024  # rows are added until a run has as many


# A row of 16,384 tokens takes the large BERT three minutes: an eighth of its equal layers is timed instead.
SIZES = {"30m": Size(384, 10, 6), "330m": Size(1024, 24, 16, slices=8)}
QUICK = Size(32, 3, 1, 50, tokens=24)


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"dtype": dtype_of(suite), "settings": asdict(SIZES[suite.split("-")[2]])}


def dtype_of(suite: str) -> str:
    """Of weights and activations, as the suite's name tells."""
    return "bfloat16" if suite.endswith("-bfloat16") else "float32"


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """One job a length: a forward pass, or forward and backward and update."""
    _, what, name, *_ = suite.split("-")
    size, dtype = QUICK if quick else SIZES[name], getattr(torch, dtype_of(suite))
    make, title = {"forward": (forward, "forward"), "train": (train, "training step")}[what]
    made = []
    for length in lengths or ([12] if quick else LENGTHS):
        rows = max(1, size.tokens // length)
        for contender, build in MODELS.items():
            work = partial(make, build, size, dtype, rows, length)
            counted = OPERATIONS[contender](size, length)
            made.append(Case(contender, length, work, job=f"{title}, {rows} x {length:,} tokens", operations=counted))
    return made


def linear_attention(module, query, key, value, attention_mask, **kwargs):
    """(1 + elu) linear attention on (B, H, T, D): the plain form with a normaliser, in linear order."""
    query, key = torch.nn.functional.elu(query) + 1, torch.nn.functional.elu(key) + 1
    total = query @ key.sum(2, keepdim=True).transpose(-1, -2)
    return (query @ (key.transpose(-1, -2) @ value) / total).transpose(1, 2).contiguous(), None


AttentionInterface.register("elu_linear_attention", linear_attention)


def blocks(size: Size) -> tuple[int, int]:
    """Layers of BERT and blocks of DANet (as many weights, to the nearest block) that are built."""
    return size.layers // size.slices, round(size.layers * 4 / 3 / size.slices)


def danet(size: Size, length: int, heads: int):
    """Our encoder."""
    config = DanetConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, num_hidden_layers=blocks(size)[1], num_attention_heads=heads,
        position_embedding_type="learned", max_position_embeddings=length,
    )  # fmt: skip
    return DanetModel(config)


def bert(size: Size, length: int, attention: str):
    """BERT with one of Transformers' attention implementations."""
    config = BertConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, num_hidden_layers=blocks(size)[0],
        num_attention_heads=size.heads, intermediate_size=4 * size.width, max_position_embeddings=length,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation=attention,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


MODELS = {
    "DANet, 4 heads": partial(danet, heads=4),
    "DANet, 1 head": partial(danet, heads=1),
    "BERT, SDPA": partial(bert, attention="sdpa"),
    "linear attention (1 + elu)": partial(bert, attention="elu_linear_attention"),
}


def bert_operations(size: Size, length: int, linear: bool) -> float:
    """Multiplications and additions of the products in the layers, for one token."""
    head = size.width // size.heads
    return size.layers * (24 * size.width**2 + 4 * size.width * (head if linear else length))


def danet_operations(size: Size, length: int, heads: int) -> float:
    """The same for DANet, in the order of the products that our layers take."""
    width, head = size.width, size.width // heads
    attention = 2 * width**2 + 4 * width * min(head, length)
    if length > width:  # queries fold into the memory: d x d, once a row
        attention = 2 * width**2 + 2 * width * head + 2 * width**2 * head / length
    if length > 4 * width:  # and the first feed-forward matrix, too
        attention = 2 * width * head + (2 * width**2 * head + 8 * width**3) / length
    return blocks(size)[1] * size.slices * (16 * width**2 + attention)


OPERATIONS = {
    "DANet, 4 heads": partial(danet_operations, heads=4),
    "DANet, 1 head": partial(danet_operations, heads=1),
    "BERT, SDPA": partial(bert_operations, linear=False),
    "linear attention (1 + elu)": partial(bert_operations, linear=True),
}


def build_model(make, size: Size, dtype: torch.dtype, rows: int, length: int):
    """A model, random tokens, and MiB of the weights that a whole model would have besides, in the layers that are left out."""
    torch.manual_seed(0)
    model = make(size, length).eval().to(dtype)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    built = sum(p.numel() * p.element_size() for each in layers for p in each.parameters())
    return model, torch.randint(0, size.vocabulary, (rows, length)), built * (size.slices - 1) / 2**20


def forward(make, size: Size, dtype: torch.dtype, rows: int, length: int) -> Work:
    """One forward pass without gradients. Where a part of the equal layers is built, their activations are the whole model's."""
    model, ids, absent = build_model(make, size, dtype, rows, length)
    return Work(torch.no_grad()(lambda: model(ids)), ids.numel() // size.slices, runs_to_peak=1, absent_mb=absent)


def train(make, size: Size, dtype: torch.dtype, rows: int, length: int) -> Work:
    """Forward, backward and AdamW with a loss on the hidden states; its moments are made at the end of the first step."""
    model, ids, _ = build_model(make, size, dtype, rows, length)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(ids).last_hidden_state.square().mean().backward()
        optimizer.step()

    # Activations of all layers are kept: a part does not tell the whole's memory.
    absent = 0.0 if size.slices == 1 else float("nan")
    return Work(step, ids.numel() // size.slices, absent_mb=absent)
