"""LEAP against the published LEAP and GPT-2 (Transformers, SDPA): a training step, and decoding from a state or a cache.

All three have the same size, learned positions, float32, and no dropout (with dropout, PyTorch's CPU attention leaves its fused
kernel for one that builds the T x T matrix, and GPT-2 would be slower still). GPT-2's GELU is the fused spelling of its own.
"""

from functools import partial

import torch
from transformers import DynamicCache

from hf_linear_attn import LeapConfig, LeapForCausalLM, RecurrentCache
from hf_linear_attn.modeling.compat import cache_keyword

from ..gpt2 import gpt2 as build_gpt2
from ..measure import Contender, Job
from ..published_leap import PublishedLeap
from . import Settings

TRAINING_LENGTHS = (512, 2048, 8192)
TOKENS_PER_STEP = 2048  # rows are added until a step has as many tokens
DECODING_CONTEXTS = (100, 1000, 8000)
DECODING_BATCH = 8
NEW_TOKENS = 16


def training_jobs(settings: Settings) -> list[Job]:
    """Forward, backward and AdamW on rows of each length."""
    jobs = []
    for length in settings.lengths or TRAINING_LENGTHS:
        rows = max(1, TOKENS_PER_STEP // length)
        makers = {name: partial(TrainingStep, make, settings, rows, length) for name, make in MODELS.items()}
        jobs.append(Job(f"training step, {rows} x {length:,} tokens", makers))
    return jobs


def decoding_jobs(settings: Settings) -> list[Job]:
    """New tokens one by one after a context, batch 8."""
    jobs = []
    for context in settings.lengths or DECODING_CONTEXTS:
        makers: dict = {
            "LEAP (ours), state": partial(Decoding, our_leap, RecurrentCache, settings, context),
            "GPT-2, cache": partial(Decoding, gpt2, DynamicCache, settings, context),
            "LEAP (published form), recomputes": partial(Recomputing, settings, context),
        }
        jobs.append(Job(f"decode, batch {DECODING_BATCH}, context {context:,}", makers))
    return jobs


def context_jobs(settings: Settings) -> list[Job]:
    """LEAP alone, from states of several contexts: the longest first, so that the others are compared with it.

    Without GPT-2 in the process, whose cache of a long context takes the processor's caches from whatever runs next.
    """
    contexts = sorted(settings.lengths or DECODING_CONTEXTS, reverse=True)
    makers = {f"LEAP (ours), context {n:,}": partial(Decoding, our_leap, RecurrentCache, settings, n) for n in contexts}
    return [Job(f"decode, batch {DECODING_BATCH}", makers)]


def our_leap(settings: Settings, positions: int):
    """Our LEAP with its default windows."""
    return LeapForCausalLM(
        LeapConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            max_position_embeddings=positions,
            hidden_dropout_prob=0.0,
        )
    )


def published_leap(settings: Settings, positions: int):
    """The published form with the same windows."""
    windows = LeapConfig(num_hidden_layers=settings.num_layers).layer_windows
    return PublishedLeap(settings.vocab_size, settings.hidden_size, settings.num_heads, windows, positions)


def gpt2(settings: Settings, positions: int):
    """GPT-2 of the same size."""
    return build_gpt2(settings.vocab_size, settings.hidden_size, settings.num_layers, settings.num_heads, positions)


MODELS = {"LEAP (ours)": our_leap, "LEAP (published form)": published_leap, "GPT-2": gpt2}


class TrainingStep(Contender):
    """One optimizer step of a model on random tokens."""

    def __init__(self, make, settings: Settings, rows: int, length: int):
        torch.manual_seed(0)
        self.model = make(settings, length).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(0, settings.vocab_size, (rows, length))
        self.tokens = rows * length

    def run(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad(set_to_none=True)
        output = self.model(input_ids=self.ids, labels=self.ids)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        self.optimizer.step()


class Decoding(Contender):
    """New tokens one by one from a state or cache that holds the context."""

    def __init__(self, make, cache_class, settings: Settings, context: int):
        torch.manual_seed(0)
        self.model = make(settings, context + NEW_TOKENS).eval()
        self.ids = torch.randint(0, settings.vocab_size, (DECODING_BATCH, context + NEW_TOKENS))
        self.context = context
        self.tokens = DECODING_BATCH * NEW_TOKENS
        self.cache = cache_class(config=self.model.config)
        with torch.no_grad():
            for start in range(0, context, 1000):  # in parts, so that prefilling does not set the peak memory
                part = self.ids[:, start : min(start + 1000, context)]
                self.model(input_ids=part, use_cache=True, logits_to_keep=1, **cache_keyword(self.cache))

    def run(self) -> None:
        """Read the logits of each new token, from the end of the context."""
        if isinstance(self.cache, RecurrentCache):
            cache = self.cache.fork()  # its time counts against us
        else:
            cache = self.cache
            if (grown := cache.get_seq_length() - self.context) > 0:
                cache.crop(-grown)  # in place, and free
        with torch.no_grad():
            for i in range(self.context, self.context + NEW_TOKENS):
                self.model(input_ids=self.ids[:, i : i + 1], use_cache=True, **cache_keyword(cache))


class Recomputing(Contender):
    """The published form has no state: the context is read again for every new token."""

    def __init__(self, settings: Settings, context: int):
        torch.manual_seed(0)
        self.model = published_leap(settings, context + 1).eval()
        self.ids = torch.randint(0, settings.vocab_size, (DECODING_BATCH, context + 1))
        self.tokens = DECODING_BATCH

    def run(self) -> None:
        """One new token for each row."""
        with torch.no_grad():
            self.model(self.ids)
