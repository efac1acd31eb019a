"""Train a text classifier with Trainer, from a pretrained checkpoint or from new weights: accuracy, macro F1, curve, resuming.

from hf_linear_attn.training.classification import train_classifier
from hf_linear_attn.training.options import TrainingOptions

report = train_classifier(TrainingOptions(task="classification", data=["r8"], from_checkpoint="outputs/mlm", epochs=3))
print(report["test"]["accuracy"], report["test"]["macro_f1"])
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, Trainer, set_seed

from ..hub.loading import load_tokenizer
from ..modeling.shared.cross_entropy import cross_entropy
from .checkpoints import StopOnSignal
from .classification_data import describe_rows, load_classification
from .files import write_text_whole
from .language_modeling import REPORT_FILE, describe_machine, limit_tokenizer, run_trainer, training_arguments
from .learning_curve import curve_of, save_curve
from .measuring import Throughput
from .model_choice import build_model
from .options import TrainingOptions
from .progress import TrainingProgress
from .run_folder import RunFolder
from .text_data import SPLITS
from .tokenized_text import train_bpe_tokenizer

if TYPE_CHECKING:
    from datasets import DatasetDict

DEFAULT_SET = "speeches"


def train_classifier(options: TrainingOptions) -> dict[str, Any]:
    """Train, evaluate, save. Returns the report that also lies in the output folder as training_report.json.

    The folder then holds the model with the names of its classes, and the tokenizer: `pipeline("text-classification", folder)`
    works. Raises ValueError for options that do not fit, FileNotFoundError for a set that is not installed, TrainingInterrupted
    after Ctrl-C or SIGTERM (a checkpoint has been written).
    """
    run = RunFolder(options, REPORT_FILE, sources=(options.from_checkpoint, options.tokenizer))
    if (finished := run.finished_report()) is not None:
        return finished
    if options.threads:
        torch.set_num_threads(options.threads)
    metrics = require_scikit_learn()
    rows = load_classification(
        options.data or DEFAULT_SET,
        options.validation_data,
        options.test_data,
        options.text_column,
        options.label_column,
    )
    print(f"texts: {describe_rows(rows)}")
    labels = rows["train"].features["label"].names
    tokenizer = _tokenizer(options, rows)
    encoded = {split: EncodedTexts(rows[split], tokenizer, options.block_length) for split in SPLITS}

    set_seed(options.seed)
    model = build_model(options, tokenizer, labels)
    longest = limit_tokenizer(tokenizer, model)
    model.config.problem_type = "single_label_classification"
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    family = model.config.model_type
    parameters = sum(p.numel() for p in model.parameters())
    start = f"from {options.from_checkpoint}" if options.from_checkpoint else "with new weights"
    print(f"model: {family} {start}, {parameters / 1e6:.2f} million parameters")

    throughput, stop = Throughput(_texts_per_step(options, encoded["train"])), StopOnSignal()
    trainer = Trainer(
        model=model,
        args=training_arguments(options, run.path, len(encoded["train"])),
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=loss_of_texts,
        compute_metrics=lambda prediction: classification_metrics(prediction, metrics),
        callbacks=[throughput, stop],
    )
    TrainingProgress.replace_default(trainer, show_bar=not options.quiet)
    run_trainer(trainer, stop, run)
    measured = run.values()  # before the final evaluation
    report = {
        "task": options.task,
        "family": family,
        "longest_text": longest,
        "parameters": parameters,
        "text": f"{' '.join(options.data) or DEFAULT_SET}: {describe_rows(rows)}",
        "labels": labels,
        "steps": trainer.state.global_step,
        "training_texts": trainer.state.global_step * options.batch_size * options.accumulate,
        "training_seconds": round(measured["seconds"], 1),
        "texts_per_second": throughput.tokens_per_second,
        "peak_memory_mb": round(measured["peak_memory_mb"], 1),
        **{split: _evaluate(trainer, encoded[split], split) for split in SPLITS[1:]},
        "curve": curve_of(trainer.state.log_history),
        "options": asdict(options),
        "machine": describe_machine(),
    }
    _save(trainer, tokenizer, report, run.path)
    return report


def _texts_per_step(options: TrainingOptions, texts) -> int:
    rows = options.batch_size * options.accumulate
    if len(texts) < rows:
        raise ValueError(
            f"the training split has {len(texts)} texts, fewer than the {rows} of one step (batch_size times accumulate): give "
            "smaller ones or more texts"
        )
    return rows


class EncodedTexts(torch.utils.data.Dataset):
    """Token ids of the texts, cut to `length`, and their labels."""

    def __init__(self, rows, tokenizer, length: int):
        self.ids = tokenizer(list(rows["text"]), truncation=True, max_length=length, verbose=False)["input_ids"]
        self.labels = list(rows["label"])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def loss_of_texts(output: Any, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Cross-entropy over the texts of this batch, divided by the number of those of all accumulated batches.

    Made here, not by the model: Transformers' own classifiers do not heed that number, and Trainer trusts them to.
    """
    return cross_entropy(output["logits"], labels, num_items_in_batch)


def require_scikit_learn():
    """Return `sklearn.metrics`, or say which command installs it."""
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError("macro F1 needs scikit-learn: pip install 'hf-linear-attn[train]'") from error
    return metrics


def classification_metrics(prediction: Any, metrics) -> dict[str, float]:
    """Accuracy, and F1 as the plain mean over the classes."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    guessed = np.argmax(logits, axis=-1)
    classes = np.arange(logits.shape[-1])
    return {
        "accuracy": float(metrics.accuracy_score(prediction.label_ids, guessed)),
        "macro_f1": float(
            metrics.f1_score(prediction.label_ids, guessed, average="macro", labels=classes, zero_division=0)
        ),
    }


def _evaluate(trainer: Trainer, texts: EncodedTexts, split: str) -> dict[str, float]:
    found = trainer.evaluate(texts, metric_key_prefix=split)
    return {name: found[f"{split}_{name}"] for name in ("loss", "accuracy", "macro_f1")}


def _tokenizer(options: TrainingOptions, rows: "DatasetDict"):
    """That of the checkpoint, the one named, or a BPE trained on the training texts."""
    named = options.from_checkpoint or options.tokenizer
    tokenizer = (
        load_tokenizer(named)
        if named is not None
        else train_bpe_tokenizer(rows["train"]["text"], options.vocab_size, for_encoder=True)
    )
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {named} has no padding token, and texts of a batch differ in length")
    return tokenizer


def _save(trainer: Trainer, tokenizer, report: dict[str, Any], folder: Path) -> None:
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(str(folder))
    save_curve({report["family"]: report["curve"]}, folder, None, report["text"].split(":")[0])
    write_text_whole(folder / REPORT_FILE, json.dumps(report, indent=1) + "\n")  # last: it says that the run has ended
