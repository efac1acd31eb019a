"""What a saved model scores: perplexity and bits per byte of a text, masked words, or classes of labelled rows."""

import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from ..hub.loading import load_config, load_model, load_tokenizer, saved_class
from .classification_data import SETS, load_classification, read_labelled_rows
from .measuring import perplexity
from .progress import followed
from .text_data import TextData, load_hub_dataset, load_speeches, load_whole_files
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
    label_column: str = "label",
    join_rows: bool = False,
) -> dict[str, Any]:
    """Load a model with the head it was saved with, and measure it on the text that is named (the speeches if none is).

    `data` may be what `train` takes: files, and for a classifier the name of a set, of which `split` (test) is measured.

    Returns a dictionary with `class`, `data`, `seconds`, the metrics of that head, and the counts behind them.

    Raises:
        ValueError: a head that is not measured here, a text shorter than a block, labels that the model does not have.
        OSError: no such checkpoint.
    """
    config = load_config(checkpoint)
    name = saved_class(config) or "(none)"
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
    model = load_model(getattr(transformers, auto_class), checkpoint).to(device).eval()
    tokenizer = load_tokenizer(checkpoint)
    started = time.perf_counter()
    if measure is evaluate_classes:
        rows = _labelled_rows(list(data), text_column, label_column, split)
        result = evaluate_classes(model, tokenizer, rows, batch_size, block_length)
        result["data"] = ", ".join(map(str, data)) + (f" ({split or 'test'})" if _is_a_set(data) else "")
    else:
        text = _text(data, dataset, dataset_config, text_column, join_rows)
        title = f"{text.description} ({split or 'test'})" if split or not data else text.description
        split = split or ("train" if data else "test")
        longest = getattr(config, "max_position_embeddings", None) or LONGEST_BLOCK
        length = block_length or min(longest, LONGEST_BLOCK)
        more = {"seed": seed} if measure is evaluate_masked_words else {}
        result = measure(model, tokenizer, text, split, length, batch_size, max_tokens, **more)
        result["data"] = title
    return {"class": type(model).__name__} | result | {"seconds": time.perf_counter() - started}


def _text(data, dataset, dataset_config, text_column, join_rows) -> TextData:
    """The named text. A user's own files are all one split, `train`: nothing of them is held out."""
    if dataset:
        return load_hub_dataset(dataset, dataset_config, text_column, join_rows)
    if not data:
        return load_speeches()
    return load_whole_files(data, text_column, join_rows)


def _batches(blocks: TokenBlocks, size: int, device) -> Iterator[torch.Tensor]:
    """Rows of ids (at most `size`, block length); how far it has come is shown."""
    for first in followed(range(0, len(blocks), size), "batches evaluated"):
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
    model,
    tokenizer,
    rows: list[tuple[str, Any]],
    batch_size: int = 4,
    max_length: int | None = None,
) -> dict[str, float]:
    """Accuracy and macro F1 (scikit-learn's) on rows of a text and a label (number or name of a class)."""
    from sklearn.metrics import accuracy_score, f1_score

    labels = [_class_of(label, model.config) for _, label in rows]
    predicted: list[int] = []
    longest = max_length or getattr(model.config, "max_position_embeddings", None) or LONGEST_BLOCK
    texts = [text for text, _ in rows]
    for first in followed(range(0, len(texts), batch_size), "batches evaluated"):
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


def _is_a_set(data) -> bool:
    """Whether the data is one of the labelled sets that `train` knows by name ("r8", or "spam-assassin:mails.tgz")."""
    return len(data) == 1 and str(data[0]).partition(":")[0] in SETS


def _labelled_rows(data: list[str], text_column: str, label_column: str, split: str | None) -> list[tuple[str, Any]]:
    """Text and label of every row that is named; of a set, of its split."""
    if not data:
        raise ValueError(
            "a classifier needs labelled rows: give --data with a .csv or .jsonl of the columns text and label, or with the "
            f"name of a set: {', '.join(SETS)}"
        )
    if not _is_a_set(data):
        return read_labelled_rows("the data", data, text_column, label_column)
    found = load_classification(data)[split or "test"]
    names = found.features["label"].names
    return [(row["text"], names[row["label"]]) for row in found]


def _class_of(label: str | float, config) -> int:
    """The class that a label names or numbers."""
    names, count = config.label2id or {}, config.num_labels
    if label in names:
        return names[label]
    try:
        number = int(label)
    except (ValueError, OverflowError):
        number = -1
    if number != label and str(number) != str(label).strip():
        number = -1
    if not 0 <= number < count:
        known = ", ".join(map(str, list(names)[:8]))
        raise ValueError(
            f"label {label!r} is outside 0 to {count - 1}, the model's classes, and none of their names ({known})"
        )
    return number
