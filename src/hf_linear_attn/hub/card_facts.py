"""What a card tells of each family, and what it measures of a model."""

import os
import platform
import time

import torch
from transformers import PreTrainedModel

from ..modeling.shared.compat import cache_keyword, cache_of
from ..modeling.shared.states.cache import RecurrentCache

HEADS = {  # end of the class name -> (Auto class, pipeline of the Hub)
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForMultipleChoice": ("AutoModelForMultipleChoice", "multiple-choice"),
    "ForPreTraining": ("AutoModelForPreTraining", "fill-mask"),
    "Model": ("AutoModel", "feature-extraction"),
}


def head_of(model: PreTrainedModel) -> tuple[str, str]:
    """Auto class and Hub pipeline of a model."""
    name = type(model).__name__.removeprefix("FSDP")
    return next(found for ending, found in HEADS.items() if name.endswith(ending))


def describe(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Family, sizes and windows, as rows of a table."""
    config = model.config
    facts = [
        ("family", config.model_type),
        ("class", type(model).__name__),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("numbers", str(model.dtype).removeprefix("torch.")),
        ("layers", config.num_hidden_layers),
        ("width", config.hidden_size),
        ("heads", config.num_attention_heads),
        ("vocabulary", f"{config.vocab_size:,}"),
    ]
    windows = getattr(config, "layer_windows", None)
    if windows is not None:
        facts.append(("windows in tokens", ", ".join("all" if w is None else str(w) for w in windows)))
    facts.append(("longest text in tokens", limit if (limit := position_limit(config)) else "no limit"))
    return [(name, str(value)) for name, value in facts]


def position_limit(config) -> int | None:
    """Longest text that learned positions allow, None where positions are unbounded."""
    kind = getattr(config, "position_embedding_type", "learned")
    return getattr(config, "max_position_embeddings", None) if kind in ("learned", "absolute") else None


def machine() -> str:
    """Processor, threads and versions: without them a speed means nothing."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def measure(model: PreTrainedModel, prompt: int = 128, new: int = 32) -> list[tuple[str, str]]:
    """Tokens per second (medians of three runs) and, for a causal model, bytes of state after short and long texts."""
    longest = position_limit(model.config) or prompt + new
    new = max(1, min(new, longest // 4))
    prompt = max(1, min(prompt, longest - new))
    ids = torch.arange(prompt, device=model.device)[None] % model.config.vocab_size
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if head_of(model)[0] != "AutoModelForCausalLM":
                return [(f"tokens per second, texts of {prompt}", f"{prompt / _median(lambda: model(ids)):,.0f}")]
            rows = [
                (
                    f"tokens per second, reading {prompt}",
                    f"{prompt / _median(lambda: model(ids, use_cache=True)):,.0f}",
                ),
                (f"tokens per second, writing {new}", f"{new / _median(lambda: _write(model, ids, new)):,.0f}"),
            ]
            return rows + _state_sizes(model, ids)
    finally:
        model.train(was_training)


def _state_sizes(model, ids) -> list[tuple[str, str]]:
    sizes: dict[int, int] = {}
    for length in sorted({max(1, ids.shape[1] // 8), ids.shape[1]}):
        cache = RecurrentCache(config=model.config)
        model(ids[:, :length], use_cache=True, **cache_keyword(cache))
        sizes[length] = cache.state_size()
    return [(f"state after {length} tokens, bytes a text", f"{size:,}") for length, size in sizes.items()]


def _write(model, ids, count) -> None:
    output = model(ids[:, :1], use_cache=True)
    for _ in range(count - 1):
        output = model(ids[:, :1], use_cache=True, **cache_keyword(cache_of(output)))


def _median(function) -> float:
    function()
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[1]
