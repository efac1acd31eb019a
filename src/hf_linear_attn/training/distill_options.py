"""Every knob of `hf-linear-attn distill`, once. Light to import, so that `--help` answers at once."""

# ruff: noqa: RUF009  (`option` is `dataclasses.field` with a help text)

from dataclasses import dataclass
from typing import Any

from .number_range import LARGEST_INT, NOT_NEGATIVE, SEED, THREADS, NumberRange
from .options import PRECISIONS, RunOptions, check_values, option, path

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
FREE_ON_RESUME = frozenset({"output", "resume", "overwrite", "quiet", "threads", "keep_checkpoints", "save_every"})


@dataclass
class DistillOptions(RunOptions):
    """Options of one distillation. Constructing them checks every value; ValueError names the field and its range."""

    file_name = OPTIONS_FILE
    command = "distill"
    free_on_resume = FREE_ON_RESUME

    # The models.
    teacher: str | None = option(None, "models", "folder or Hub name of the pretrained model", path, metavar="NAME")
    example: bool = option(False, "models", "fine-tune or train a small teacher first, then distil it", bool)
    task: str = option("causal-lm", "models", "what the teacher predicts", choices=TASKS)
    k: int = option(64, "models", "mean number of keys that a query attends to in a head", int)
    predictor_length: int = option(128, "models", "width of the compressed attention", int)
    softmax_layers: list[int] = option(
        [],
        "models",
        "layers that keep softmax attention",
        int,
        metavar="LAYER",
        range=NumberRange(least=0, most=LARGEST_INT),
    )
    lora: int | None = option(None, "models", "rank of adapters; trains them and SEA, freezes the rest", int)
    freeze_host: bool = option(False, "models", "train what SEA adds, and nothing else", bool)

    # The text.
    data: list[str] = option(
        [],
        "text",
        "training files; classification: with columns text and label, or a set: bbc, r8, spam-assassin, speeches",
        path,
        metavar="FILE",
    )
    validation_data: list[str] = option([], "text", "validation files (default: 5%% of the text)", path, metavar="FILE")
    block_length: int = option(
        512,
        "text",
        "tokens in a row; classification: the most tokens of a text",
        int,
        range=NumberRange(least=2, most=LARGEST_INT),
    )

    # The optimisation.
    steps: int = option(1000, "optimisation", "optimizer steps", int)
    batch_size: int = option(4, "optimisation", "rows in one step on a device", int)
    accumulate: int = option(1, "optimisation", "batches added up before an optimizer step", int)
    learning_rate: float = option(1e-5, "optimisation", "learning rate of the teacher's weights", float)
    sea_learning_rate: float = option(1e-3, "optimisation", "learning rate of what SEA adds", float)
    task_weight: float = option(0.1, "optimisation", "weight of the task's own loss", float, range=NOT_NEGATIVE)
    hidden_weight: float = option(10.0, "optimisation", "weight of the hidden states' error", float, range=NOT_NEGATIVE)
    logits_weight: float = option(0.1, "optimisation", "weight of the KL of the predictions", float, range=NOT_NEGATIVE)
    attention_weight: float = option(
        1.0, "optimisation", "weight of the attention layers' losses", float, range=NOT_NEGATIVE
    )
    loss_rows: int | None = option(None, "optimisation", "query rows that these look at (default: all)", int)
    precision: str = option("float32", "optimisation", "arithmetic of the forward pass", choices=PRECISIONS)
    cpu: bool = option(False, "optimisation", "stay on the CPU even if there is an accelerator", bool)
    threads: int | None = option(None, "optimisation", "CPU threads (default: PyTorch's choice)", int, range=THREADS)
    seed: int = option(0, "optimisation", "seed of the weights and the order of the batches", int, range=SEED)

    # The run.
    output: str = option("outputs/distill", "run", "folder for the student and its report", path, metavar="FOLDER")
    resume: bool = option(False, "run", "continue the interrupted run in the output folder", bool)
    overwrite: bool = option(False, "run", "replace an earlier run in the output folder", bool)
    log_every: int = option(20, "run", "steps between two lines of losses", int)
    eval_rows: int = option(64, "run", "validation rows of an evaluation", int)
    save_every: int | None = option(None, "run", "steps between checkpoints (default: a tenth of the run)", int)
    keep_checkpoints: int = option(2, "run", "newest checkpoints that stay on disk", int)
    quiet: bool = option(False, "run", "no progress bar", bool)

    def __post_init__(self):
        self.expand_paths()
        check_values(self)
        if (self.teacher is None) == (not self.example):
            raise ValueError("give either teacher, a pretrained model, or example, which trains a small one")
        if self.example and self.task == "causal-lm" and self.data:
            raise ValueError("the example of a language model learns the speeches: leave data out")
        if self.task == "classification" and not self.data:
            raise ValueError("classification needs data: files with the columns text and label, or the name of a set")
        if self.resume and self.overwrite:
            raise ValueError("resume continues the run that overwrite would replace: give one of the two")

    @classmethod
    def from_arguments(cls, given: dict[str, Any]) -> "DistillOptions":
        """Options from those given; `example` brings its own defaults, of MiniLM where that is installed."""
        if given.get("example"):
            from .distill_example import example_set, minilm_folder

            task = given.get("task") or ("classification" if minilm_folder() else "causal-lm")
            data = {"data": [example_set()]} if task == "classification" else {}
            given = {**EXAMPLES.get(task, {}), **data, "task": task, **given}
        return cls(**given)
