"""Whole models that SEA was put into, beside the hosts that they are made of (SDPA): does it pay, and from which length on?

    sea-bert-forward, sea-bert-train          MiniLM's shape: 6 layers, width 384, 12 heads
    sea-llama-forward, sea-llama-train        SmolLM2-135M's shape: 30 layers, width 576, 9 heads, 3 of keys
    sea-llama-decode                          tokens one by one after a context, with the cache that generate() takes by default

Random weights, which no time depends on, and positions for the longest text. A training step is forward and backward of the
body, without a teacher. On a CPU: float32, one row, contenders taking turns; the host is the first of each job, so that "times"
are how many times as long a contender takes. On a GPU: bfloat16, rows of 16,384 tokens in all, decoding 16 rows at once.
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaModel

from hf_linear_attn.conversion import linearize
from hf_linear_attn.modeling.shared.compat import cache_keyword
from hf_linear_attn.modeling.shared.states.cache import RecurrentCache

from ..harness import Case, Work, device
from ..private import private

SHAPES = {
    "bert": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "llama": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
}
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VOCABULARY = 1000
SIZES = {
    f"SEA, k {k}, M {cells}{', dense below' if shortest else ''}": {
        "k": k,
        "predictor_length": cells,
        "min_sparse_length": shortest,
    }
    for k, cells in ((13, 64), (64, 128))
    for shortest in (0, "auto")
}
CPU_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
GPU_LENGTHS = (1024, 4096, 16384, 65536, 131072)
GPU_TOKENS, GPU_ROWS = 16384, 16  # a batch of forward and training; rows of decoding
NEW_TOKENS = 4


@dataclass(frozen=True)
class Size:
    """Of a run: the host's shape, rows of a batch, dtype."""

    host: str
    quick: bool

    def build(self, contender: str | None, length: int) -> torch.nn.Module:
        """The host (None) or what `linearize` makes of it, in eval mode."""
        torch.manual_seed(0)
        shape = (TINY if self.quick else SHAPES[self.host]) | {"vocab_size": VOCABULARY}
        config, model = (BertConfig, BertModel) if self.host == "bert" else (LlamaConfig, LlamaModel)
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if self.host == "bert" else {}
        host = model(config(max_position_embeddings=length, **shape, **dropout))
        made = host if contender is None else linearize(host, "sea", **SIZES[contender])
        return made.to(device=device(), dtype=torch.float32 if device() == "cpu" else torch.bfloat16).eval()


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {
        "unit": "ms",
        "dtype": "float32" if device() == "cpu" else "bfloat16",
        "settings": SHAPES[suite.split("-")[1]],
    }


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """At each length the host, then each size of SEA."""
    _, host, what = suite.split("-")
    size, on_cpu = Size(host, quick), device() == "cpu"
    make = {"forward": run, "train": training, "decode": decode}[what]
    made = []
    for length in lengths or ([16] if quick else CPU_LENGTHS if on_cpu else GPU_LENGTHS):
        job = f"{host} {what}, {length:,} tokens" if on_cpu else ""
        for name in (None, *SIZES):
            shown = f"{host.upper() if host == 'bert' else 'Llama'} (SDPA)" if name is None else name
            made.append(Case(shown, length, partial(make, size, name, length), job=job))
    return made


def tokens_of(length: int) -> torch.Tensor:
    """Ids (rows, length)."""
    rows = 1 if device() == "cpu" else max(1, GPU_TOKENS // length)
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0)).to(device())


def run(size: Size, contender: str | None, length: int) -> Work:
    """A forward pass."""
    model, ids = size.build(contender, length), tokens_of(length)
    options = {} if size.host == "bert" else {"use_cache": False}

    def step():
        with torch.inference_mode():
            model(ids, **options)

    return Work(step, ids.numel())


def training(size: Size, contender: str | None, length: int) -> Work:
    """Forward and backward; no optimizer, whose share does not depend on attention."""
    model, ids = size.build(contender, length), tokens_of(length)
    options = {} if size.host == "bert" else {"use_cache": False}

    def step():
        model.zero_grad(set_to_none=True)
        model(ids, **options).last_hidden_state.float().square().mean().backward()

    return Work(step, ids.numel())


def decode(size: Size, contender: str | None, length: int) -> Work:
    """New tokens after a context whose keys and values are random: to compute them would take longer than to measure."""
    rows = 1 if device() == "cpu" else GPU_ROWS
    model = size.build(contender, length + 4096)  # calls go on from each other
    cache = DynamicCache() if contender is None else RecurrentCache(config=model.config)
    with torch.inference_mode():
        fill(model, cache, rows, length)
    ids = torch.zeros(rows, 1, dtype=torch.long, device=device())

    def step():
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                position = torch.full_like(ids, cache.get_seq_length())
                model(ids, position_ids=position, use_cache=True, **cache_keyword(cache))

    return Work(step, rows * NEW_TOKENS, count=NEW_TOKENS)


def fill(model, cache, rows: int, length: int) -> None:
    """Let `cache` hold a context of random keys and values, and the state that belongs to them."""
    layers = {} if isinstance(cache, DynamicCache) and not isinstance(cache, RecurrentCache) else model.sea_layers()
    host = model.config.host_config if layers else model.config
    heads, dim, dtype = (
        host.num_key_value_heads,
        host.hidden_size // host.num_attention_heads,
        next(model.parameters()).dtype,
    )
    layout = private("KeyLayout").from_mask(None, rows, length, torch.device(device()))
    for i in range(host.num_hidden_layers):
        keys, values = (torch.randn(rows, heads, length, dim, device=device(), dtype=dtype) for _ in range(2))
        if not layers:
            cache.update(keys, values, i)
            continue
        cache.layers[i].update(keys, values)
        cache.layers[i].begin_state(tuple(layers[i].state_after(keys, values, layout, None)), length, None)
