"""Every knob of `hf-linear-attn distill`, once. Light to import, so that `--help` answers at once."""

# ruff: noqa: RUF009  (`option` is `dataclasses.field` with a help text)

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..modeling.whole_files import write_whole
from .options import PRECISIONS, option

OPTIONS_FILE = "distill_options.json"
TASKS = ("causal-lm", "classification")
# What `--example` takes where nothing else is said: MiniLM on topics of news, or a small language model on the speeches.
EXAMPLES: dict[str, dict[str, Any]] = {
    "classification": {
        "k": 13,
        "predictor_length": 64,
        "block_length": 96,
        "steps": 40,
        "batch_size": 8,
        "learning_rate": 2e-5,
        "sea_learning_rate": 3e-3,
        "loss_rows": 32,
        "eval_rows": 64,
    },
    "causal-lm": {"k": 16, "predictor_length": 64, "block_length": 256, "steps": 200, "loss_rows": 64, "eval_rows": 16},
}
# What a resumed run may change: none of these alters the loss curve.
FREE_ON_RESUME = {"output", "resume", "overwrite", "quiet", "threads", "keep_checkpoints", "save_every"}


@dataclass
class DistillOptions:
    """Options of one distillation. Constructing them checks every value; ValueError names the field and its range."""

    # The models.
    teacher: str | None = option(None, "models", "folder or Hub name of the pretrained model", metavar="NAME")
    example: bool = option(False, "models", "fine-tune or train a small teacher first, then distil it", bool)
    task: str = option("causal-lm", "models", "what the teacher predicts", choices=TASKS)
    k: int = option(64, "models", "mean number of keys that a query attends to in a head", int)
    predictor_length: int = option(128, "models", "width of the compressed attention", int)
    softmax_layers: list[int] = option([], "models", "layers that keep softmax attention", int, metavar="LAYER")
    lora: int | None = option(None, "models", "rank of adapters; trains them and SEA, freezes the rest", int)
    freeze_host: bool = option(False, "models", "train what SEA adds, and nothing else", bool)

    # The text.
    data: list[str] = option(
        [],
        "text",
        "training files; classification: with columns text and label, or a set: bbc, r8, spam-assassin, speeches",
        metavar="FILE",
    )
    validation_data: list[str] = option([], "text", "validation files (default: 5%% of the text)", metavar="FILE")
    block_length: int = option(512, "text", "tokens in a row; classification: the most tokens of a text", int)

    # The optimisation.
    steps: int = option(1000, "optimisation", "optimizer steps", int)
    batch_size: int = option(4, "optimisation", "rows in one step on a device", int)
    accumulate: int = option(1, "optimisation", "batches added up before an optimizer step", int)
    learning_rate: float = option(1e-5, "optimisation", "learning rate of the teacher's weights", float)
    sea_learning_rate: float = option(1e-3, "optimisation", "learning rate of what SEA adds", float)
    task_weight: float = option(0.1, "optimisation", "weight of the task's own loss", float)
    hidden_weight: float = option(10.0, "optimisation", "weight of the hidden states' error", float)
    logits_weight: float = option(0.1, "optimisation", "weight of the KL of the predictions", float)
    attention_weight: float = option(1.0, "optimisation", "weight of the attention layers' losses", float)
    loss_rows: int | None = option(None, "optimisation", "query rows that these look at (default: all)", int)
    precision: str = option("float32", "optimisation", "arithmetic of the forward pass", choices=PRECISIONS)
    cpu: bool = option(False, "optimisation", "stay on the CPU even if there is an accelerator", bool)
    threads: int | None = option(None, "optimisation", "CPU threads (default: PyTorch's choice)", int)
    seed: int = option(0, "optimisation", "seed of the weights and the order of the batches", int)

    # The run.
    output: str = option("outputs/distill", "run", "folder for the student and its report", metavar="FOLDER")
    resume: bool = option(False, "run", "continue the interrupted run in the output folder", bool)
    overwrite: bool = option(False, "run", "delete an earlier run in the output folder first", bool)
    log_every: int = option(20, "run", "steps between two lines of losses", int)
    eval_rows: int = option(64, "run", "validation rows of an evaluation", int)
    save_every: int | None = option(None, "run", "steps between checkpoints (default: a tenth of the run)", int)
    keep_checkpoints: int = option(2, "run", "newest checkpoints that stay on disk", int)
    quiet: bool = option(False, "run", "no progress bar", bool)

    def __post_init__(self):
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{each.name} must be one of {', '.join(choices)}, got {value!r}")
            if each.metadata["kind"] is int and isinstance(value, int) and value < (0 if each.name == "seed" else 1):
                raise ValueError(f"{each.name} must be greater than 0, got {value}")
        for name in ("learning_rate", "sea_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if (self.teacher is None) == (not self.example):
            raise ValueError("give either teacher, a pretrained model, or example, which trains a small one")
        if self.example and self.task == "causal-lm" and self.data:
            raise ValueError("the example of a language model learns the speeches: leave data out")
        if self.task == "classification" and not self.data:
            raise ValueError("classification needs data: files with the columns text and label, or the name of a set")
        if self.resume and self.overwrite:
            raise ValueError("resume continues the run that overwrite would delete: give one of the two")

    def save(self, folder: Path) -> None:
        """Write the options beside the run."""
        write_whole(folder / OPTIONS_FILE, lambda part: part.write_text(json.dumps(asdict(self), indent=2) + "\n"))

    @classmethod
    def from_arguments(cls, given: dict[str, Any]) -> "DistillOptions":
        """Options from those given; `example` brings its own defaults, of MiniLM where that is installed."""
        if given.get("example"):
            from .distill_example import example_set, minilm_folder

            task = given.get("task") or ("classification" if minilm_folder() else "causal-lm")
            data = {"data": [example_set()]} if task == "classification" else {}
            given = {**EXAMPLES.get(task, {}), **data, "task": task, **given}
        return cls(**given)

    @classmethod
    def for_resume(cls, given: dict[str, Any]) -> "DistillOptions":
        """Options of the run in given["output"]; other given values must be equal to the run's, or harmless."""
        folder = Path(given.get("output", cls.output))
        file = folder / OPTIONS_FILE
        if not file.exists():
            raise ValueError(
                f"there is no run to resume in {str(folder)!r} ({OPTIONS_FILE} is missing): distil without resume"
            )
        saved = json.loads(file.read_text())
        for name, value in given.items():
            if name not in FREE_ON_RESUME and value != saved[name]:
                raise ValueError(
                    f"the run in {str(folder)!r} has {name}={saved[name]!r}, so resuming with {name}={value!r} would "
                    f"bend its loss curve: leave {name} out, or start a new run in another output folder"
                )
        return cls(**{**saved, "overwrite": False, **given, "resume": True})
