"""One distillation from a pretrained model to its SEA student on files of text, with a report; resumable."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

from ..conversion.linearize import linearize
from ..hub.safe_weights import from_safetensors
from .checkpoints import StopOnSignal, last_complete_checkpoint
from .classification_data import describe_rows, load_classification
from .distill_example import example_teacher
from .distill_options import OPTIONS_FILE, DistillOptions
from .language_modeling import TrainingInterrupted, describe_machine, stack_blocks
from .measuring import peak_memory_mb
from .perplexity import perplexity
from .progress import TrainingProgress
from .sea_distillation import SeaDistillationArguments, SeaDistillationTrainer, add_lora, sea_model
from .text_data import load_files, load_speeches
from .tokenized_text import TokenBlocks, prepare_text

REPORT_FILE = "distillation_report.json"
AUTO_CLASSES = {"causal-lm": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}


def distill(options: DistillOptions) -> dict[str, Any]:
    """Load or train the teacher, convert, distil, evaluate before and after, save.

    The output folder then holds the student with its tokenizer (the Auto classes load it) and distillation_report.json.
    Raises ValueError for options that do not fit, TrainingInterrupted after Ctrl-C or SIGTERM (a checkpoint is
    written).
    """
    folder = _prepare_folder(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    teacher_name = example_teacher(options, folder) if options.example else options.teacher
    teacher = from_safetensors(getattr(transformers, AUTO_CLASSES[options.task]), teacher_name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    train, validation, collator = _data(options, tokenizer, teacher)
    set_seed(options.seed)
    student = linearize(
        teacher, "sea", k=options.k, predictor_length=options.predictor_length, softmax_layers=options.softmax_layers
    )
    added = sum(p.numel() for core in student.sea_layers().values() for p in core.parameters())
    print(f"teacher: {teacher.config.model_type}, {teacher.num_parameters() / 1e6:.2f} million parameters")
    print(f"student: SEA adds {added / 1e6:.2f} million; k = {options.k}, M = {options.predictor_length}")
    trainer = SeaDistillationTrainer(
        add_lora(student, options.lora) if options.lora else student,
        teacher,
        _arguments(options, folder),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=collator,
    )
    stop = StopOnSignal()
    trainer.add_callback(stop)
    TrainingProgress.replace_default(trainer, show_bar=not options.quiet)
    report: dict[str, Any] = {"before": evaluate(trainer, options.task), "added_parameters": added}
    checkpoint = last_complete_checkpoint(folder) if options.resume else None
    if options.resume:
        print(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the first step")
    started = time.perf_counter()
    with stop:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        raise TrainingInterrupted(trainer.state.global_step, folder, stop.received)
    report |= {
        "after": evaluate(trainer, options.task),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "steps": trainer.state.global_step,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "options": asdict(options),
        "machine": describe_machine(),
    }
    model = trainer.model.merge_and_unload() if options.lora else sea_model(trainer.model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    return report


@torch.no_grad()
def evaluate(trainer: SeaDistillationTrainer, task: str) -> dict[str, float]:
    """Metrics on the validation rows: losses of student and teacher, perplexity or accuracy, fidelity of the
    estimate.
    """
    if task == "classification":
        output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        metrics, labels = output.metrics, torch.as_tensor(output.label_ids)
        metrics["eval_accuracy"] = float((torch.as_tensor(output.predictions).argmax(-1) == labels).float().mean())
        right = 0
        for batch in trainer.get_eval_dataloader():
            batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
            right += int((trainer.teacher(**batch).logits.argmax(-1) == batch["labels"]).sum())
        metrics["eval_teacher_accuracy"] = right / len(labels)
    else:
        metrics = trainer.evaluate()
        metrics["eval_perplexity"] = perplexity(metrics["eval_loss"])
        metrics["eval_teacher_perplexity"] = perplexity(metrics["eval_teacher_loss"])
    unwanted = ("runtime", "per_second", "preparation_time")
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if name.startswith("eval_") and not name.endswith(unwanted)
    }


def _data(options: DistillOptions, tokenizer, teacher):
    """Training rows, validation rows, collator."""
    if options.task == "classification":
        return *_classified_texts(options, tokenizer, teacher), DataCollatorWithPadding(tokenizer)
    data = load_files(options.data, options.validation_data) if options.data else load_speeches()
    print(f"text: {data.description}")
    limit = teacher.config.max_position_embeddings
    length = min(options.block_length, limit)
    if length < options.block_length:
        print(f"rows of {length} tokens: the teacher has no more positions")
    _, text = prepare_text(data, len(tokenizer), tokenizer.name_or_path)
    rows = options.batch_size * options.accumulate
    train = TokenBlocks(text.ids["train"], length, name="train").keep_multiple_of(rows)
    return train, TokenBlocks(text.ids["validation"], length, options.eval_rows * length), stack_blocks


def _classified_texts(options, tokenizer, teacher):
    texts = load_classification(options.data, options.validation_data)
    print(f"texts: {describe_rows(texts)}")
    names, ids, count = texts["train"].features["label"].names, teacher.config.label2id, teacher.config.num_labels
    wrong = [name for name in names if name not in ids and not (name.isdigit() and int(name) < count)]
    if wrong:
        raise ValueError(
            f"the label {wrong[0]!r} is neither one of the teacher's ({', '.join(map(str, ids))}) nor a number from 0 to "
            f"{count - 1}"
        )
    labels = [ids[name] if name in ids else int(name) for name in names]
    length = min(options.block_length, teacher.config.max_position_embeddings)

    def encode(batch):
        encoded = tokenizer(batch["text"], truncation=True, max_length=length)
        return encoded | {"labels": [labels[label] for label in batch["label"]]}

    encoded = texts.map(encode, batched=True, remove_columns=texts["train"].column_names)
    rows = min(options.eval_rows, len(encoded["validation"]))
    return encoded["train"], encoded["validation"].select(range(rows))


def _arguments(options: DistillOptions, folder: Path) -> SeaDistillationArguments:
    return SeaDistillationArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        sea_learning_rate=options.sea_learning_rate,
        task_weight=options.task_weight,
        hidden_weight=options.hidden_weight,
        logits_weight=options.logits_weight,
        attention_weight=options.attention_weight,
        attention_loss_rows=options.loss_rows,
        train_host=not options.freeze_host and not options.lora,
        bf16=options.precision == "bfloat16",
        fp16=options.precision == "float16",
        use_cpu=options.cpu,
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=options.log_every,
        logging_first_step=True,
        save_steps=options.save_every or max(1, options.steps // 10),
        save_total_limit=options.keep_checkpoints,
        disable_tqdm=options.quiet,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available() and not options.cpu,
    )


def _prepare_folder(options: DistillOptions) -> Path:
    """Make the output folder, and refuse to mix two runs in it."""
    folder = Path(options.output).expanduser()
    if (folder / OPTIONS_FILE).exists() and not options.resume:
        if not options.overwrite:
            raise ValueError(
                f"output={options.output!r} holds an earlier run: continue it with --resume, delete it with "
                "--overwrite, or name another folder"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        options.save(folder)
    return folder
