r"""DANet encoders against BERT (Transformers, SDPA) and a plain linear-attention encoder of as many parameters.

    python -m benchmarks.cpu_speed danet-forward danet-train --sizes 30m 330m

The sizes are BERT's. A DANet block has 9 d^2 weights and a BERT block 12 d^2, so DANet is 4/3 as deep. All have learned
positions, compute without dropout and return hidden states. The linear-attention encoder is BERT with softmax
replaced by the 1 + elu feature map. "By operations" is what the operations of the blocks' matrix products alone would give.
"""

from functools import partial

import torch
from transformers import AttentionInterface, BertConfig, BertModel

from hf_linear_attn import DanetConfig, DanetModel

from ..measure import Contender, Job
from . import Settings

LENGTHS = (128, 1024, 4096, 16384)
TOKENS_PER_RUN = 1024  # rows are added until a run has as many tokens


def linear_attention(module, query, key, value, attention_mask, **kwargs):
    """(1 + elu) linear attention on (B, H, T, D): the plain form with a normaliser, in linear order."""
    query, key = torch.nn.functional.elu(query) + 1, torch.nn.functional.elu(key) + 1
    total = query @ key.sum(2, keepdim=True).transpose(-1, -2)
    return (query @ (key.transpose(-1, -2) @ value) / total).transpose(1, 2).contiguous(), None


AttentionInterface.register("elu_linear_attention", linear_attention)


def blocks(settings: Settings) -> tuple[int, int]:
    """Layers of BERT and blocks of DANet (as many weights, to the nearest block) that are built."""
    return settings.num_layers // settings.slices, round(settings.num_layers * 4 / 3 / settings.slices)


def danet(settings: Settings, length: int, heads: int):
    """Our encoder."""
    return DanetModel(
        DanetConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=blocks(settings)[1],
            num_attention_heads=heads,
            position_embedding_type="learned",
            max_position_embeddings=length,
        )
    )


def bert(settings: Settings, length: int, attention: str):
    """BERT with one of Transformers' attention implementations."""
    config = BertConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=blocks(settings)[0],
        num_attention_heads=settings.num_heads,
        intermediate_size=4 * settings.hidden_size,
        max_position_embeddings=length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )
    return BertModel(config, add_pooling_layer=False)


MODELS = {
    "DANet, 4 heads": partial(danet, heads=4),
    "DANet, 1 head": partial(danet, heads=1),
    "BERT, SDPA": partial(bert, attention="sdpa"),
    "linear attention (1 + elu)": partial(bert, attention="elu_linear_attention"),
}


def bert_operations(settings: Settings, length: int, linear: bool) -> float:
    """Multiplications and additions of the products in the layers, for one token."""
    width, head = settings.hidden_size, settings.hidden_size // settings.num_heads
    return settings.num_layers * (24 * width**2 + 4 * width * (head if linear else length))


def danet_operations(settings: Settings, length: int, heads: int) -> float:
    """The same for DANet, in the order of the products that our layers take."""
    width, head = settings.hidden_size, settings.hidden_size // heads
    attention = 2 * width**2 + 4 * width * min(head, length)
    if length > width:  # queries fold into the memory: d x d, once a row
        attention = 2 * width**2 + 2 * width * head + 2 * width**2 * head / length
    if length > 4 * width:  # and the first feed-forward matrix, too
        attention = 2 * width * head + (2 * width**2 * head + 8 * width**3) / length
    return blocks(settings)[1] * settings.slices * (16 * width**2 + attention)


OPERATIONS = {
    "DANet, 4 heads": partial(danet_operations, heads=4),
    "DANet, 1 head": partial(danet_operations, heads=1),
    "BERT, SDPA": partial(bert_operations, linear=False),
    "linear attention (1 + elu)": partial(bert_operations, linear=True),
}


def jobs(settings: Settings, training: bool) -> list[Job]:
    """One job a length: a forward pass, or forward and backward and update."""
    made = []
    for length in settings.lengths or LENGTHS:
        rows = max(1, TOKENS_PER_RUN // length)
        kind = TrainingStep if training else Forward
        makers: dict = {name: partial(kind, make, settings, rows, length) for name, make in MODELS.items()}
        what = "training step" if training else "forward"
        counts = {name: count(settings, length) for name, count in OPERATIONS.items()}
        made.append(Job(f"{what}, {rows} x {length:,} tokens", makers, counts))
    return made


class Forward(Contender):
    """One forward pass over random tokens, without gradients.

    Where a part of the equal layers is built, their activations are those of the whole model, and `absent_mb` is the rest of the
    weights.
    """

    runs_to_peak = 1

    def __init__(self, make, settings: Settings, rows: int, length: int):
        torch.manual_seed(0)
        self.model = make(settings, length).eval().to(getattr(torch, settings.dtype))
        self.ids = torch.randint(0, settings.vocab_size, (rows, length))
        self.tokens = rows * length // settings.slices
        layers = [module for module in self.model.modules() if isinstance(module, torch.nn.ModuleList)]
        built = sum(p.numel() * p.element_size() for each in layers for p in each.parameters())
        self.absent_mb = built * (settings.slices - 1) / 2**20

    def run(self) -> None:
        """Hidden states."""
        with torch.no_grad():
            self.model(self.ids)


class TrainingStep(Forward):
    """Forward, backward and AdamW over random tokens, with a loss on the hidden states."""

    runs_to_peak = 2  # AdamW's moments are made at the end of the first step

    def __init__(self, make, settings: Settings, rows: int, length: int):
        super().__init__(make, settings, rows, length)
        if settings.slices != 1:
            self.absent_mb = float("nan")  # activations of all layers are kept: a part does not tell
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def run(self) -> None:
        """One update."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self.ids).last_hidden_state.square().mean().backward()
        self.optimizer.step()
