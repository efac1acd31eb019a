"""Train a language model, causal or with masked words, with Trainer: data, model, curve, evaluation, resuming, and a folder
that AutoModel loads.

from hf_linear_attn.training.language_modeling import train_language_model
from hf_linear_attn.training.options import TrainingOptions

report = train_language_model(TrainingOptions(family="leap", steps=200, output="outputs/leap"))
print(report["test"]["perplexity"], report["tokens_per_second"])
"""

import json
import platform
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainingArguments, set_seed

from ..hub.card_facts import position_limit
from .checkpoints import LossSinceLog, StopOnSignal
from .files import write_text_whole
from .learning_curve import curve_of, save_curve
from .masked_words import (
    BlocksToMask,
    MaskedOnce,
    MaskedWordsTrainer,
    MaskingCollator,
    NewMasksEachEpoch,
)
from .measuring import Throughput, perplexity
from .model_choice import build_model
from .options import TrainingOptions
from .progress import TrainingProgress
from .run_folder import RunFolder
from .text_data import SPLITS, TextData, load_files, load_hub_dataset, load_speeches
from .tokenized_text import TokenBlocks, TokenizedText, prepare_text

REPORT_FILE = "training_report.json"


class TrainingInterrupted(RuntimeError):
    """The run was stopped by a signal. It lies in a checkpoint; `signal_number` says which signal it was."""

    def __init__(self, step: int, folder: Path, signal_number: int):
        super().__init__(f"stopped after step {step}, which is saved: continue with --resume --output {folder}")
        self.step, self.signal_number = step, signal_number


def load_text(options: TrainingOptions) -> TextData:
    """The text that the options name; the presidents' speeches where they name none."""
    if options.dataset:
        return load_hub_dataset(options.dataset, options.dataset_config, options.text_column, options.join_rows)
    if options.data:
        files = (options.data, options.validation_data, options.test_data)
        return load_files(*files, text_column=options.text_column, join_rows=options.join_rows)
    if options.validation_data or options.test_data:
        raise ValueError("validation_data and test_data need data, the files to train on")
    return load_speeches()


def train_language_model(options: TrainingOptions) -> dict[str, Any]:
    """Train, evaluate, save. Returns the report that also lies in the output folder as training_report.json.

    The folder then holds the model and its tokenizer (AutoModelForCausalLM or AutoModelForMaskedLM, and AutoTokenizer),
    learning_curve.png and .json.
    Two runs whose options differ only in the model see the same batches in the same order.
    Raises ValueError for options that do not fit, TrainingInterrupted after Ctrl-C or SIGTERM (a checkpoint has been
    written).
    """
    run = RunFolder(options, REPORT_FILE, sources=(options.from_checkpoint, options.tokenizer))
    if (finished := run.finished_report()) is not None:
        return finished
    if options.threads:
        torch.set_num_threads(options.threads)
    data = load_text(options)
    print(f"text: {data.description}")
    masked = options.task == "mlm"
    tokenizer, text = prepare_text(
        data, options.vocab_size, options.from_checkpoint or options.tokenizer, for_encoder=masked
    )
    counts = ", ".join(f"{split} {len(text.ids[split]):,}" for split in SPLITS)
    print(f"tokens: {counts} (vocabulary {len(tokenizer)})")

    set_seed(options.seed)
    model = build_model(options, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    family = model.config.model_type
    print(f"model: {family}, {parameters / 1e6:.2f} million parameters")
    longest = limit_tokenizer(tokenizer, model)

    tokens_per_step = options.batch_size * options.accumulate * options.block_length
    throughput, stop = Throughput(tokens_per_step), StopOnSignal()
    trainer = _trainer(options, model, tokenizer, text, run.path, [throughput, stop])
    limit = options.final_eval_tokens
    final: dict[str, Any] = {
        split: TokenBlocks(text.ids[split], options.block_length, limit, name=split) for split in SPLITS[1:]
    }
    if masked:
        final = {split: MaskedOnce(blocks, trainer.data_collator) for split, blocks in final.items()}
    run_trainer(trainer, stop, run)
    measured = run.values()  # before the final evaluation

    report = {
        "task": options.task,
        "family": family,
        "parameters": parameters,
        "longest_text": longest,
        "text": data.description,
        "steps": trainer.state.global_step,
        "tokens_per_step": tokens_per_step,
        "training_tokens": trainer.state.global_step * tokens_per_step,
        "training_seconds": round(measured["seconds"], 1),
        "tokens_per_second": throughput.tokens_per_second,
        "peak_memory_mb": round(measured["peak_memory_mb"], 1),
        **{split: evaluate_split(trainer, final[split], text, split) for split in final},
        "curve": curve_of(trainer.state.log_history),
        "options": asdict(options),
        "machine": describe_machine(),
    }
    _save(trainer, tokenizer, report, run.path)
    return report


def _trainer(options: TrainingOptions, model, tokenizer, text: TokenizedText, folder: Path, callbacks: list) -> Trainer:
    """Trainer over the training blocks, with a sample of the validation blocks for its evaluations."""
    rows_per_step = options.batch_size * options.accumulate
    train = TokenBlocks(text.ids["train"], options.block_length, name="train").keep_multiple_of(rows_per_step)
    sample = TokenBlocks(text.ids["validation"], options.block_length, options.eval_tokens, name="validation")
    collator, trainer_class = stack_blocks, Trainer
    if options.task == "mlm":
        collator = MaskingCollator(tokenizer, options.mask_share, options.seed)
        train, sample = BlocksToMask(train), MaskedOnce(sample, collator)
        callbacks = [*callbacks, NewMasksEachEpoch(collator)]
        trainer_class = MaskedWordsTrainer
    trainer = trainer_class(
        model=model,
        args=training_arguments(options, folder, len(train)),
        train_dataset=train,
        eval_dataset=sample,
        processing_class=tokenizer,
        data_collator=collator,
        callbacks=callbacks,
    )
    TrainingProgress.replace_default(trainer, show_bar=not options.quiet)
    return trainer


def run_trainer(trainer: Trainer, stop: StopOnSignal, run: RunFolder) -> None:
    """Train from the start or from the checkpoint of the run. TrainingInterrupted after a signal."""
    args, max_steps, checkpoint = trainer.args, trainer.args.max_steps, run.checkpoint
    if run.options.resume:
        print(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the first step")
    if run.step >= max_steps:
        print(f"all {run.step} steps are done: nothing is left to train")
        args.max_steps, args.num_train_epochs = (
            -1,
            0,
        )  # Trainer would take one step more, and so loads the checkpoint alone
    trainer.add_callback(run)
    if not any(isinstance(each, LossSinceLog) for each in trainer.callback_handler.callbacks):
        trainer.add_callback(LossSinceLog(trainer))
    run.start()
    try:
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception:
        run.withdraw()
        raise
    args.max_steps = trainer.state.max_steps = max_steps
    if stop.received is not None and trainer.state.global_step < max_steps:
        raise TrainingInterrupted(trainer.state.global_step, run.path, stop.received)


def training_arguments(options: TrainingOptions, folder: Path, rows: int) -> TrainingArguments:
    """Trainer's arguments for the options. Order of the batches depends on the seed and the number of rows alone."""
    rows_per_step = options.batch_size * options.accumulate
    steps = options.steps or max(1, int((options.epochs or 1) * rows / rows_per_step))
    tenth = max(1, steps // 10)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule if options.schedule != "constant" else "constant_with_warmup",
        warmup_steps=int(options.warmup * steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        bf16=options.precision == "bfloat16",
        fp16=options.precision == "float16",
        **checkpointing(options.gradient_checkpointing),
        torch_compile=options.compile,
        use_cpu=options.cpu,
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=options.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # shows a NaN as it is, and does not wait for the device at every step
        eval_strategy="steps",
        eval_steps=options.eval_every or tenth,
        prediction_loss_only=options.task == "causal-lm",
        save_steps=options.save_every or tenth,
        disable_tqdm=options.quiet,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available() and not options.cpu,
    )


def checkpointing(wanted: bool) -> dict[str, bool]:
    """The argument that recomputes activations, under the name that the installed Transformers gives it."""
    if not wanted:
        return {}
    names = {each.name for each in fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": True}


def stack_blocks(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Blocks of equal length -> one batch (B, T); nothing is padded, so there is no mask."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def evaluate_split(trainer: Trainer, blocks: TokenBlocks, text: TokenizedText, split: str) -> dict[str, float]:
    """Mean loss (nats per token) and perplexity over all blocks of a split; bits per byte, or share of masked words guessed."""
    metrics = trainer.evaluate(blocks, metric_key_prefix=split)
    loss = metrics[f"{split}_loss"]
    found = {"loss": loss, "perplexity": perplexity(loss)}
    if f"{split}_accuracy" in metrics:
        return found | {"accuracy": metrics[f"{split}_accuracy"]}
    return found | {"bits_per_byte": text.bits_per_byte(split, loss)}


def describe_machine() -> dict[str, Any]:
    """Processor, threads and versions, which every reported speed needs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def limit_tokenizer(tokenizer, model) -> int | None:
    """Tell the tokenizer where the model's texts end: `truncation=True` cuts there. Returns that length, None for none."""
    longest = position_limit(model.config)
    if longest is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return longest


def _save(trainer: Trainer, tokenizer, report: dict[str, Any], folder: Path) -> None:
    if report["task"] == "causal-lm":
        trainer.model.config.use_cache = True  # Trainer switches it off for training, and would save it so
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(str(folder))
    label = report["family"]
    save_curve({label: report["curve"]}, folder, {label: report["tokens_per_step"]}, report["text"].split(":")[0])
    write_text_whole(folder / REPORT_FILE, json.dumps(report, indent=1) + "\n")  # last: it says that the run has ended
