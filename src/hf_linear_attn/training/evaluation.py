"""What a saved model scores: perplexity and bits per byte of a text, masked words, or classes of labelled rows."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer

from ..hub.safe_weights import from_safetensors
from .perplexity import perplexity
from .text_data import FILE_FORMATS, TextData, load_hub_dataset, load_speeches, load_whole_files, require_datasets
from .tokenized_text import TokenBlocks, tokenize_documents

MASKED_SHARE = 0.15
LONGEST_BLOCK = 512


def evaluate_checkpoint(
    checkpoint: str,
    data: list[str] | tuple[str, ...] = (),
    dataset: str | None = None,
    dataset_config: str | None = None,
    text_column: str = "text",
    split: str | None = None,
    block_length: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Load a model with the head it was saved with, and measure it on the text that is named (the speeches if none is).

    Returns a dictionary with `class`, `data`, `seconds`, the metrics of that head, and the counts behind them.

    Raises:
        ValueError: a head that is not measured here, a text shorter than a block, labels that the model does not have.
        OSError: no such checkpoint.
    """
    import transformers

    import hf_linear_attn  # noqa: F401  (registers our families)

    config = AutoConfig.from_pretrained(checkpoint)
    name = (config.architectures or ["(none)"])[0]
    measures = {
        "ForCausalLM": ("AutoModelForCausalLM", evaluate_language_model),
        "LMHeadModel": ("AutoModelForCausalLM", evaluate_language_model),
        "ForMaskedLM": ("AutoModelForMaskedLM", evaluate_masked_words),
        "ForSequenceClassification": ("AutoModelForSequenceClassification", evaluate_classes),
    }
    found = next((value for ending, value in measures.items() if name.endswith(ending)), None)
    if found is None:
        raise ValueError(
            f"{checkpoint} was saved as {name}: language models, masked language models and text classifiers are measured "
            "here; for other heads use Trainer(compute_metrics=...).evaluate()"
        )
    auto_class, measure = found
    model = from_safetensors(getattr(transformers, auto_class), checkpoint).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    started = time.perf_counter()
    if measure is evaluate_classes:
        result = evaluate_classes(model, tokenizer, list(data), text_column, batch_size, block_length)
        result["data"] = ", ".join(map(str, data))
    else:
        text = _text(data, dataset, dataset_config, text_column)
        title = f"{text.description} ({split or 'test'})" if split or not data else text.description
        split = split or ("train" if data else "test")
        longest = getattr(config, "max_position_embeddings", None) or LONGEST_BLOCK
        length = block_length or min(longest, LONGEST_BLOCK)
        more = {"seed": seed} if measure is evaluate_masked_words else {}
        result = measure(model, tokenizer, text, split, length, batch_size, max_tokens, **more)
        result["data"] = title
    return {"class": type(model).__name__} | result | {"seconds": time.perf_counter() - started}


def _text(data, dataset, dataset_config, text_column) -> TextData:
    """The named text. A user's own files are all one split, `train`: nothing of them is held out."""
    if dataset:
        return load_hub_dataset(dataset, dataset_config, text_column)
    if not data:
        return load_speeches()
    return load_whole_files(data, text_column)


def _batches(blocks: TokenBlocks, size: int, device) -> Iterator[torch.Tensor]:
    """Rows of ids (at most `size`, block length) with a progress bar."""
    for first in tqdm(range(0, len(blocks), size), desc="evaluating", unit="batch", leave=False):
        rows = [blocks[i]["input_ids"] for i in range(first, min(first + size, len(blocks)))]
        yield torch.stack(rows).to(device)


def _split(text: TextData, split: str) -> None:
    if split not in text.documents:
        raise ValueError(f"the data has the splits {', '.join(text.documents)}, and none is called {split!r}")


@torch.no_grad()
def evaluate_language_model(
    model, tokenizer, text: TextData, split: str, block_length: int, batch_size: int = 4, max_tokens: int | None = None
) -> dict[str, float]:
    """Mean loss (nats per predicted token) over blocks of a split, perplexity, and bits per byte of its text."""
    _split(text, split)
    encoded = tokenize_documents(TextData({split: text.documents[split]}, ""), tokenizer)
    blocks = TokenBlocks(encoded.ids[split], block_length, max_tokens, name=split)
    total, count = 0.0, 0
    for ids in _batches(blocks, batch_size, model.device):
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    loss = total / count
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": encoded.bits_per_byte(split, loss),
        "predicted_tokens": count,
        "block_length": block_length,
    }


@torch.no_grad()
def evaluate_masked_words(
    model,
    tokenizer,
    text: TextData,
    split: str,
    block_length: int,
    batch_size: int = 4,
    max_tokens: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Loss, perplexity and accuracy on 15% of the tokens, all of them replaced by the mask token.

    Raises:
        ValueError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError(
            "the tokenizer has no mask token, so no word can be masked: set tokenizer.mask_token and save it"
        )
    _split(text, split)
    encoded = tokenize_documents(TextData({split: text.documents[split]}, ""), tokenizer)
    blocks = TokenBlocks(encoded.ids[split], block_length, max_tokens, name=split)
    generator = torch.Generator().manual_seed(seed)
    total, right, count = 0.0, 0, 0
    for ids in _batches(blocks, batch_size, model.device):
        masked = (torch.rand(ids.shape, generator=generator) < MASKED_SHARE).to(ids.device)
        logits = model(ids.masked_fill(masked, tokenizer.mask_token_id)).logits[masked].float()
        total += torch.nn.functional.cross_entropy(logits, ids[masked], reduction="sum").item()
        right += int((logits.argmax(-1) == ids[masked]).sum())
        count += int(masked.sum())
    if count == 0:
        raise ValueError("no token was masked: give more text")
    loss = total / count
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "accuracy": right / count,
        "masked_tokens": count,
        "block_length": block_length,
    }


@torch.no_grad()
def evaluate_classes(
    model, tokenizer, files: list[str], text_column: str = "text", batch_size: int = 4, max_length: int | None = None
) -> dict[str, float]:
    """Accuracy and macro F1 (scikit-learn's) on .csv or .jsonl rows with a text and a column `label` (number or name)."""
    from sklearn.metrics import accuracy_score, f1_score

    datasets = require_datasets()
    if not files:
        raise ValueError(
            "a classifier needs labelled rows: give --data with a .csv or .jsonl of the columns text and label"
        )
    builder = FILE_FORMATS.get(Path(files[0]).suffix.lower())
    if builder not in ("csv", "json", "parquet"):
        raise ValueError(f"labelled rows must be .csv, .jsonl or .parquet, got {files[0]!r}")
    for file in files:
        if not Path(file).exists():
            raise ValueError(f"the data {file!r} does not exist")
    rows = datasets.load_dataset(builder, data_files=files, split="train")
    missing = {text_column, "label"} - set(rows.column_names)
    if missing:
        raise ValueError(f"{files[0]!r} lacks the columns {sorted(missing)}; it has {rows.column_names}")
    names = model.config.label2id or {}
    labels = [names[x] if x in names else int(x) for x in rows["label"]]
    wrong = sorted({label for label in labels if not 0 <= label < model.config.num_labels})
    if wrong:
        raise ValueError(f"labels {wrong[:5]} are outside 0 to {model.config.num_labels - 1}, the model's classes")
    predicted: list[int] = []
    longest = max_length or getattr(model.config, "max_position_embeddings", None) or LONGEST_BLOCK
    texts = list(rows[text_column])
    for first in tqdm(range(0, len(texts), batch_size), desc="evaluating", unit="batch", leave=False):
        batch = tokenizer(
            texts[first : first + batch_size], padding=True, truncation=True, max_length=longest, return_tensors="pt",
            return_token_type_ids=False,
        )  # fmt: skip
        predicted += model(**batch.to(model.device)).logits.argmax(-1).tolist()
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
        "rows": len(labels),
    }
