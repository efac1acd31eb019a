"""Speed, memory and state of the language models of `reproduction.language_models`, one after another in several rounds."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import timer
from hf_linear_attn import RecurrentCache
from hf_linear_attn.modeling.shared.compat import cache_keyword

from .language_model_contenders import Setting, build

STEPS = 10
DECODED = 32


def measure_models(
    names: list[str], setting: Setting, vocab_size: int, device: str, rounds: int
) -> Iterator[dict[str, dict[str, Any]]]:
    """Yields after every round, for each model: training and decoding tokens per second of each round so far, peak MiB of a
    training step (weights, gradients and Adam's averages included), bytes of the state after `length` tokens.

    Models take turns in every round, so that other work on the machine slows all of them. Weights are float32, the forward
    pass is autocast to bfloat16 on a GPU; training steps are compiled where the recipe says so. Decoding: batch 1, eager, at a
    context of `length` tokens.
    """
    trainers = {name: Trainer(name, setting, vocab_size, device) for name in names}
    found: dict[str, dict[str, Any]] = {
        name: {
            "training_tokens_per_second": [],
            "decoding_tokens_per_second": [],
            "peak_memory_mb": trainer.peak_memory_mb,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
        }
        for name, trainer in trainers.items()
    }
    for _ in range(rounds):
        for name, trainer in trainers.items():
            tokens = STEPS * setting.recipe.batch_size * setting.recipe.length
            found[name]["training_tokens_per_second"].append(tokens / trainer.seconds(STEPS))
        for name, trainer in trainers.items():
            rate, state = trainer.decode()
            found[name]["decoding_tokens_per_second"].append(rate)
            found[name]["state_bytes"] = state
        yield found


class Trainer:
    """A model and its optimiser on random tokens, warmed up."""

    def __init__(self, name: str, setting: Setting, vocab_size: int, device: str):
        self.cuda = device.startswith("cuda")
        self.setting, self.device = setting, device
        before = torch.cuda.memory_allocated() if self.cuda else 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        self.model = build(name, setting, vocab_size).to(device)
        self.run = torch.compile(self.model) if setting.recipe.compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(3, vocab_size, (setting.recipe.batch_size, setting.recipe.length), device=device)
        self.seconds(3)
        self.peak_memory_mb = (torch.cuda.max_memory_allocated() - before) / 2**20 if self.cuda else None

    def seconds(self, steps: int) -> float:
        """Time of so many training steps."""
        self.model.train()
        return steps * timer(self.step).timeit(steps).mean

    def step(self) -> None:
        """Forward, backward, update."""
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16, enabled=self.cuda):
            loss = self.run(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.setting.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def decode(self) -> tuple[float, int]:
        """Tokens per second of greedy decoding that ends at `length` tokens, and the bytes of the state there."""
        self.model.eval()
        cache = RecurrentCache(config=self.model.config)
        context = max(1, self.setting.recipe.length - DECODED)
        ids = self.model(self.ids[:1, :context], use_cache=True, **cache_keyword(cache)).logits[:, -1:].argmax(-1)
        count = min(DECODED, self.setting.recipe.length - context)

        started = _now(self.cuda)  # not `timeit`, whose calls to warm up would be tokens beyond the length
        for _ in range(count):
            ids = self.model(ids, use_cache=True, **cache_keyword(cache)).logits[:, -1:].argmax(-1)
        return count / (_now(self.cuda) - started), cache.state_size()


def _now(cuda: bool) -> float:
    """The clock, after what the device has still to do."""
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
