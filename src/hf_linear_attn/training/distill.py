"""One distillation from a pretrained model to its SEA or Hedgehog student on files of text, with a report; resumable."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

from ..conversion.linearize import linearize
from ..hub.loading import load_model, load_tokenizer
from ..modeling.shared.files.state_file import INPUT_DTYPES
from .checkpoints import StopOnSignal
from .classification_data import describe_rows, load_classification
from .distill_example import example_teacher
from .distill_options import DistillOptions
from .distillation import DistillationTrainer, add_lora
from .files import write_text_whole
from .hedgehog_distillation import HedgehogDistillationArguments, HedgehogDistillationTrainer, layer_table
from .language_modeling import TrainingInterrupted, checkpointing, describe_machine, run_trainer, stack_blocks
from .measuring import perplexity
from .progress import TrainingProgress
from .run_folder import RunFolder
from .sea_distillation import SeaDistillationArguments, SeaDistillationTrainer
from .text_data import load_files, load_speeches
from .tokenized_text import TokenBlocks, prepare_text

REPORT_FILE = "distillation_report.json"
TRAINERS: dict[str, Any] = {"sea": SeaDistillationTrainer, "hedgehog": HedgehogDistillationTrainer}
AUTO_CLASSES = {"causal-lm": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}


def distill(options: DistillOptions) -> dict[str, Any]:
    """Load or train the teacher, convert, distil, evaluate before and after, save.

    The output folder then holds the student with its tokenizer (the Auto classes load it) and distillation_report.json.
    Raises ValueError for options that do not fit, TrainingInterrupted after Ctrl-C or SIGTERM (a checkpoint is
    written).
    """
    run = RunFolder(options, REPORT_FILE, sources=(options.teacher,))
    if (finished := run.finished_report()) is not None:
        return finished
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        return _distill(options, run)
    except TrainingInterrupted:
        raise
    except Exception:
        run.withdraw()
        raise


def _distill(options: DistillOptions, run: RunFolder) -> dict[str, Any]:
    if options.example:
        run.start()  # training the teacher is a part of the run that can be resumed
    teacher_name = example_teacher(options, run.path) if options.example else options.teacher
    teacher = load_model(getattr(transformers, AUTO_CLASSES[options.task]), teacher_name, dtype=torch.float32)
    tokenizer = load_tokenizer(teacher_name)
    train, validation, collator = _data(options, tokenizer, teacher)
    set_seed(options.seed)
    arguments = _arguments(options, run.path)
    student, choice = _student(options, teacher, train, arguments, run)
    added = _describe(options, teacher, student)
    trainer = TRAINERS[options.to](
        add_lora(student, options.lora) if options.lora else student,
        teacher,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=collator,
    )
    stop = StopOnSignal()
    trainer.add_callback(stop)
    TrainingProgress.replace_default(trainer, show_bar=not options.quiet)
    report: dict[str, Any] = {"before": evaluate(trainer, options.task), "added_parameters": added}
    if options.to == "hedgehog":
        trainer.stages.softmax_choice = choice
        report["layers_before"] = trainer.layer_errors()
    run_trainer(trainer, stop, run)
    report |= {
        "after": evaluate(trainer, options.task),
        **(_of_hedgehog(trainer, options, report) if options.to == "hedgehog" else {}),
        "seconds": round(run.values()["seconds"], 1),
        "peak_memory_mb": round(run.values()["peak_memory_mb"], 1),
        "steps": trainer.state.global_step,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "options": asdict(options),
        "machine": describe_machine(),
    }
    model = trainer.model.merge_and_unload() if options.lora else trainer.student_in(trainer.model)
    model.save_pretrained(run.path)
    tokenizer.save_pretrained(run.path)
    write_text_whole(
        run.path / REPORT_FILE, json.dumps(report, indent=2) + "\n"
    )  # last: it says that the run has ended
    return report


def _student(options: DistillOptions, teacher, train, arguments, run: RunFolder):
    """The student, and what its softmax layers were chosen by, None where they were named."""
    if options.to == "sea":
        sizes = {"k": options.k, "predictor_length": options.predictor_length}
        return linearize(teacher, "sea", **sizes, softmax_layers=options.softmax_layers), None
    choice, layers, calibration = None, options.softmax_layers, None
    if layers and isinstance(layers[0], str):
        choice = _choice_of(run)  # a resumed run keeps its layers, whatever rounding would choose now
        layers = choice["softmax_layers"] if choice else layers[0]
        if choice is None:
            rows = train.blocks[: options.calibration_rows].astype("int64")
            calibration = torch.from_numpy(rows).view(-1, options.block_length)[: options.calibration_rows]
    fields: dict[str, Any] = {
        "window": options.window,
        "feature_size": options.feature_size,
        "forgetting": options.forgetting,
    }
    teacher.to(arguments.device)
    student = linearize(teacher, "hedgehog", **fields, softmax_layers=layers, calibration=calibration)
    return student, choice or getattr(student, "softmax_choice", None)


def _choice_of(run: RunFolder) -> dict[str, Any] | None:
    """By what the run to resume has chosen its softmax layers; None before its first checkpoint."""
    if run.checkpoint is None:
        return None
    state = json.loads((run.checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["stateful_callbacks"].get("Stages", {}).get("attributes", {}).get("softmax_choice")


def _describe(options: DistillOptions, teacher, student) -> int:
    """Print what teaches whom; the number of parameters that are new."""
    print(f"teacher: {teacher.config.model_type}, {teacher.num_parameters() / 1e6:.2f} million parameters")
    cores = student.sea_layers() if options.to == "sea" else student.hedgehog_layers()
    added = sum(p.numel() for core in cores.values() for p in core.parameters())
    if options.to == "sea":
        print(f"student: SEA adds {added / 1e6:.2f} million; k = {options.k}, M = {options.predictor_length}")
    else:
        kept = ", ".join(map(str, student.config.softmax_layers)) or "none"
        print(f"student: Hedgehog adds {added / 1e6:.2f} million; window {options.window}, softmax layers: {kept}")
    return added


def _of_hedgehog(trainer, options: DistillOptions, report: dict[str, Any]) -> dict[str, Any]:
    """What the report says of a student with a state of fixed size."""
    layers = trainer.layer_errors()
    print(f"end of the run\n{layer_table(layers, report['layers_before'])}")
    student = trainer.student_in(trainer.model)
    stages = trainer.stages
    return {
        "layers_after_transfer": stages.layers,
        "layers_after": layers,
        "softmax_layers": student.config.softmax_layers,
        "softmax_choice": stages.softmax_choice,
        "tokens": trainer.state.global_step * options.batch_size * options.accumulate * options.block_length,
        "state": state_sizes(student, trainer.teacher),
    }


def state_sizes(student, teacher, lengths=(2048, 16384, 131072)) -> dict[str, dict[str, float]]:
    """KiB that a row keeps after a text of each length: the student's state and the teacher's keys and values."""
    config = student.config
    size = torch.finfo(student.dtype).bits // 8
    sizes = {}
    for length in lengths:
        kept = [tensor for layer in config.state_tensors(length) for tensor in layer.values() if not tensor.optional]
        widths = [size if tensor.dtypes == INPUT_DTYPES else tensor.dtypes[0].itemsize for tensor in kept]
        ours = sum(math.prod(tensor.shape) * width for tensor, width in zip(kept, widths, strict=True))
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * size
        sizes[str(length)] = {"student_kib": round(ours / 1024, 1), "teacher_kib": round(cache / 1024, 1)}
    return sizes


@torch.no_grad()
def evaluate(trainer: DistillationTrainer, task: str) -> dict[str, float]:
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
    longest = options.longest_rows if options.to == "hedgehog" else options.block_length
    length = min(longest, limit)
    if length < longest and options.to == "hedgehog":
        raise ValueError(f"rows of {longest} tokens are longer than the {limit} positions of the teacher")
    if length < longest:
        print(f"rows of {length} tokens: the teacher has no more positions")
    _, text = prepare_text(data, len(tokenizer), tokenizer.name_or_path)
    rows = options.accumulate * _rows(options)
    train = TokenBlocks(text.ids["train"], length, name="train").keep_multiple_of(rows)
    length = min(length, options.block_length)
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


def _rows(options: DistillOptions) -> int:
    """Rows of the data in a batch: as long as the longest stage wants them."""
    return options.batch_size * options.block_length // options.longest_rows


def _arguments(options: DistillOptions, folder: Path) -> TrainingArguments:
    """Trainer's arguments for the options, with the family's own."""
    steps = options.steps or 0
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": _rows(options),
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": options.learning_rate,
        "task_weight": options.task_weight,
        "logits_weight": options.logits_weight,
        "train_host": not options.freeze_host and not options.lora,
        "bf16": options.precision == "bfloat16",
        "fp16": options.precision == "float16",
        "use_cpu": options.cpu,
        "seed": options.seed,
        "data_seed": options.seed,
        "logging_steps": options.log_every,
        "logging_first_step": True,
        "save_steps": options.save_every or max(1, min(steps // 10, 100) if options.minutes else steps // 10),
        "disable_tqdm": options.quiet,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available() and not options.cpu,
    }
    if options.to == "sea":
        return SeaDistillationArguments(
            **common,
            sea_learning_rate=options.sea_learning_rate,
            hidden_weight=options.hidden_weight,
            attention_weight=options.attention_weight,
            attention_loss_rows=options.loss_rows,
        )
    if common["bf16"] and torch.cuda.is_available() and not options.cpu:
        torch.set_float32_matmul_precision("high")  # the sums' products, which autocast leaves in float32
    names = ("transfer_share", "long_share", "transfer_length", "minutes")
    rates = ("transfer_learning_rate", "feature_learning_rate", "long_learning_rate")
    return HedgehogDistillationArguments(
        **common,
        **{name: getattr(options, name) for name in names + rates},
        **checkpointing(options.gradient_checkpointing),
        row_length=options.block_length,
        compile_parts=options.compile,
        logging_nan_inf_filter=False,  # shows a NaN as it is, and does not wait for the device at every step
        weight_decay=0.0,
    )
