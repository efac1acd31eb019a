"""LEAP against the published LEAP and GPT-2 (Transformers, SDPA): a training step, and decoding from a state or a cache.

All three have the same size, learned positions, float32, and no dropout (with dropout, PyTorch's CPU attention leaves its fused
kernel for one that builds the T x T matrix, and GPT-2 would be slower still). GPT-2's GELU is the fused form of its own.
"""

from dataclasses import asdict, dataclass
from functools import partial

import torch
from transformers import DynamicCache

from hf_linear_attn import LeapConfig, LeapForCausalLM, RecurrentCache

from ..harness import Case, Work
from ..peers import PublishedLeap
from ..peers import gpt2 as build_gpt2
from ..private import private


@dataclass(frozen=True)
class Size:
    """Of all three models."""

    width: int = 256
    layers: int = 6
    heads: int = 4
    vocabulary: int = 4096
    tokens: int = 2048  # rows are added until a training step has as many


FULL, QUICK = Size(), Size(32, 2, 1, 50, 24)
TRAINING_LENGTHS = (512, 2048, 8192)
DECODING_CONTEXTS = (100, 1000, 8000)
DECODING_BATCH = 8
NEW_TOKENS = 16


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"dtype": "float32", "settings": asdict(FULL)}


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """Jobs of a training step, or of decoding after a context."""
    size, default = (QUICK, [12]) if quick else (FULL, None)
    if suite == "leap-train":
        return [case for n in lengths or default or TRAINING_LENGTHS for case in training(size, n)]
    contexts = lengths or default or DECODING_CONTEXTS
    if suite == "leap-decode":
        return [case for n in contexts for case in decoding(size, n)]
    # LEAP alone, from states of several contexts: the longest first, so that the others are compared with it. GPT-2 is not in the
    # process, since its cache of a long context takes the processor's caches from whatever runs next.
    return [
        Case(f"LEAP (ours), context {n:,}", n, partial(decode, our_leap, RecurrentCache, size, n), job=decoding_job())
        for n in sorted(contexts, reverse=True)
    ]


def decoding_job(context: int | None = None) -> str:
    """The name of a job."""
    return f"decode, batch {DECODING_BATCH}" + ("" if context is None else f", context {context:,}")


def training(size: Size, length: int) -> list[Case]:
    """Forward, backward and AdamW on rows of a length."""
    rows = max(1, size.tokens // length)
    job = f"training step, {rows} x {length:,} tokens"
    return [Case(name, length, partial(train, make, size, rows, length), job=job) for name, make in MODELS.items()]


def decoding(size: Size, context: int) -> list[Case]:
    """New tokens one by one after a context, batch 8."""
    makers = {
        "LEAP (ours), state": partial(decode, our_leap, RecurrentCache, size, context),
        "GPT-2, cache": partial(decode, gpt2, DynamicCache, size, context),
        "LEAP (published form), recomputes": partial(recompute, size, context),
    }
    return [Case(name, context, make, job=decoding_job(context)) for name, make in makers.items()]


def our_leap(size: Size, positions: int):
    """Our LEAP with its default windows."""
    config = LeapConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        max_position_embeddings=positions, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return LeapForCausalLM(config)


def published_leap(size: Size, positions: int):
    """The published form with the same windows."""
    windows = LeapConfig(num_hidden_layers=size.layers).layer_windows
    return PublishedLeap(size.vocabulary, size.width, size.heads, windows, positions)


def gpt2(size: Size, positions: int):
    """GPT-2 of the same size."""
    return build_gpt2(size.vocabulary, size.width, size.layers, size.heads, positions)


MODELS = {"LEAP (ours)": our_leap, "LEAP (published form)": published_leap, "GPT-2": gpt2}


def train(make, size: Size, rows: int, length: int) -> Work:
    """One optimizer step on random tokens: forward, backward, update."""
    torch.manual_seed(0)
    model = make(size, length).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, size.vocabulary, (rows, length))

    def step():
        optimizer.zero_grad(set_to_none=True)
        output = model(input_ids=ids, labels=ids)
        (output if isinstance(output, torch.Tensor) else output.loss).backward()
        optimizer.step()

    return Work(step, rows * length)


def decode(make, cache_class, size: Size, context: int) -> Work:
    """New tokens one by one from a state or cache that holds the context: the logits of each."""
    torch.manual_seed(0)
    model, cache_keyword = make(size, context + NEW_TOKENS).eval(), private("cache_keyword")
    ids = torch.randint(0, size.vocabulary, (DECODING_BATCH, context + NEW_TOKENS))
    kept = cache_class(config=model.config)
    with torch.no_grad():
        for start in range(0, context, 1000):  # in parts, so that prefilling does not set the peak memory
            part = ids[:, start : min(start + 1000, context)]
            model(input_ids=part, use_cache=True, logits_to_keep=1, **cache_keyword(kept))

    @torch.no_grad()
    def step():
        cache = kept
        if isinstance(kept, RecurrentCache):
            cache = kept.fork()  # its time counts against us
        elif (grown := kept.get_seq_length() - context) > 0:
            kept.crop(-grown)  # in place, and free
        for i in range(context, context + NEW_TOKENS):
            model(input_ids=ids[:, i : i + 1], use_cache=True, **cache_keyword(cache))
        return cache

    return Work(step, DECODING_BATCH * NEW_TOKENS)


def recompute(size: Size, context: int) -> Work:
    """The published form has no state: the context is read again for every new token."""
    torch.manual_seed(0)
    model = published_leap(size, context + 1).eval()
    ids = torch.randint(0, size.vocabulary, (DECODING_BATCH, context + 1))
    return Work(torch.no_grad()(lambda: model(ids)), DECODING_BATCH)
