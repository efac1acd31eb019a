"""Every knob of `hf-linear-attn distill`, once. Light to import, so that `--help` answers at once."""

# ruff: noqa: RUF009  (`option` is `dataclasses.field` with a help text)

from dataclasses import dataclass
from typing import Any

from ..families import FAMILIES
from .number_range import LARGEST_INT, NOT_NEGATIVE, SEED, THREADS, NumberRange
from .options import PRECISIONS, RunOptions, check_values, option, path

OPTIONS_FILE = "distill_options.json"
TASKS = ("causal-lm", "classification")
STUDENTS = tuple(name for name, family in FAMILIES.items() if family.linearizes)
SHARE = NumberRange(least=0, most=1)
# Options that mean something for one family alone, with their values where none are given, and common ones whose value differs.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "sea": {
        "k": 64,
        "predictor_length": 128,
        "sea_learning_rate": 1e-3,
        "hidden_weight": 10.0,
        "attention_weight": 1.0,
        "loss_rows": None,
    },
    "hedgehog": {
        "window": 64,
        "feature_size": None,
        "forgetting": "none",
        "transfer_share": 0.3,
        "long_share": 0.0,
        "transfer_length": None,
        "long_length": None,
        "transfer_learning_rate": 1e-2,
        "feature_learning_rate": 1e-3,
        "long_learning_rate": None,
        "minutes": None,
        "compile": False,
        "gradient_checkpointing": False,
        "calibration_rows": 8,
    },
}
COMMON: dict[str, dict[str, Any]] = {
    "sea": {"learning_rate": 1e-5, "task_weight": 0.1, "logits_weight": 0.1, "steps": 1000},
    "hedgehog": {"learning_rate": 1e-4, "task_weight": 0.0, "logits_weight": 1.0, "steps": 1000},
}
NO_LIMIT = 1_000_000  # steps of a run that minutes end
# What `--example` takes where nothing else is said: MiniLM on topics of news, or a small language model on the speeches.
EXAMPLES: dict[str, dict[str, Any]] = {
    "hedgehog": {
        "window": 16,
        "block_length": 256,
        "steps": 200,
        "batch_size": 8,
        "eval_rows": 16,
        "learning_rate": 1e-3,
    },
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


def layer_or_share(text: str) -> int | str:
    """Kind of `softmax_layers`: a number, or what it is chosen by."""
    return text if text.startswith("auto") else int(text)


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
    to: str = option("sea", "models", "family of the student", choices=STUDENTS)
    k: int | None = option(
        None, "models", "sea: mean number of keys that a query attends to in a head (default: 64)", int
    )
    predictor_length: int | None = option(None, "models", "sea: width of the compressed attention (default: 128)", int)
    window: int | None = option(None, "models", "hedgehog: last tokens that are seen by softmax (default: 64)", int)
    feature_size: int | None = option(
        None, "models", "hedgehog: columns of a head's feature map (default: the head size)", int
    )
    forgetting: str | None = option(
        None, "models", "hedgehog: what older tokens lose (default: none)", choices=("none", "head", "token")
    )
    softmax_layers: list[int | str] = option(
        [],
        "models",
        "layers that keep softmax attention; hedgehog: or auto:25%%, that share, chosen by KL",
        layer_or_share,
        metavar="LAYER",
        range=NumberRange(least=0, most=LARGEST_INT),
    )
    calibration_rows: int | None = option(None, "models", "hedgehog: training rows to choose them on (default: 8)", int)
    lora: int | None = option(
        None, "models", "rank of adapters; trains them and what the family adds, freezes the rest", int
    )
    freeze_host: bool = option(False, "models", "train what the family adds, and nothing else", bool)

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
    steps: int | None = option(None, "optimisation", "optimizer steps (default: 1000; with minutes no limit)", int)
    minutes: float | None = option(None, "optimisation", "hedgehog: the most minutes of training", float)
    transfer_share: float | None = option(
        None,
        "optimisation",
        "hedgehog: share of steps or minutes for the layers' attention alone (default: 0.3)",
        float,
        range=SHARE,
    )
    long_share: float | None = option(
        None, "optimisation", "hedgehog: share for longer rows, at the end (default: 0)", float, range=SHARE
    )
    transfer_length: int | None = option(
        None, "optimisation", "hedgehog: tokens in a row of the first stage (default: block_length)", int
    )
    long_length: int | None = option(
        None, "optimisation", "hedgehog: tokens in a row of the last stage (default: 4 times block_length)", int
    )
    batch_size: int = option(4, "optimisation", "rows of block_length in one step on a device", int)
    accumulate: int = option(1, "optimisation", "batches added up before an optimizer step", int)
    learning_rate: float | None = option(
        None, "optimisation", "rate of the teacher's weights (default: sea 1e-5, hedgehog 1e-4)", float
    )
    sea_learning_rate: float | None = option(
        None, "optimisation", "sea: learning rate of what SEA adds (default: 1e-3)", float
    )
    transfer_learning_rate: float | None = option(
        None, "optimisation", "hedgehog: rate of feature maps in the first stage (default: 1e-2)", float
    )
    feature_learning_rate: float | None = option(
        None, "optimisation", "hedgehog: rate of feature maps in the second stage (default: 1e-3)", float
    )
    long_learning_rate: float | None = option(
        None,
        "optimisation",
        "hedgehog: rate of the teacher's weights in the last stage (default: 0.3 of learning_rate)",
        float,
    )
    task_weight: float | None = option(
        None, "optimisation", "weight of the task's own loss (default: sea 0.1, hedgehog 0)", float, range=NOT_NEGATIVE
    )
    logits_weight: float | None = option(
        None,
        "optimisation",
        "weight of the KL of the predictions (default: sea 0.1, hedgehog 1)",
        float,
        range=NOT_NEGATIVE,
    )
    hidden_weight: float | None = option(
        None, "optimisation", "sea: weight of the hidden states' error (default: 10)", float, range=NOT_NEGATIVE
    )
    attention_weight: float | None = option(
        None, "optimisation", "sea: weight of the attention layers' losses (default: 1)", float, range=NOT_NEGATIVE
    )
    loss_rows: int | None = option(None, "optimisation", "sea: query rows that these look at (default: all)", int)
    compile: bool = option(False, "optimisation", "hedgehog: use torch.compile", bool)
    gradient_checkpointing: bool = option(
        False, "optimisation", "hedgehog: save memory by computing activations again", bool
    )
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
        self._fill_in()
        if (self.teacher is None) == (not self.example):
            raise ValueError("give either teacher, a pretrained model, or example, which trains a small one")
        if self.example and self.task == "causal-lm" and self.data:
            raise ValueError("the example of a language model learns the speeches: leave data out")
        if self.task == "classification" and not self.data:
            raise ValueError("classification needs data: files with the columns text and label, or the name of a set")
        if self.resume and self.overwrite:
            raise ValueError("resume continues the run that overwrite would replace: give one of the two")

    def _fill_in(self) -> None:
        """Values that depend on the family; ValueError for an option of another one."""
        for name, options in OF_FAMILY.items():
            given = [each for each in options if getattr(self, each) not in (None, False)]
            if name != self.to and given:
                raise ValueError(f"{given[0]} belongs to --to {name}: leave it out, or take that family")
        if self.steps is None and self.minutes is not None:
            self.steps = NO_LIMIT
        for name, value in (OF_FAMILY[self.to] | COMMON[self.to]).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        words = [each for each in self.softmax_layers if isinstance(each, str)]
        if words and (self.to != "hedgehog" or len(self.softmax_layers) > 1):
            raise ValueError(
                f"softmax_layers takes numbers, or with --to hedgehog one word such as auto:25%, got {words[0]!r}"
            )
        if self.to == "hedgehog":
            self._fill_in_stages()

    def _fill_in_stages(self) -> None:
        """Lengths and rates that follow from others; ValueError for what cannot be cut."""
        if self.task != "causal-lm":
            raise ValueError(f"hedgehog is distilled as a causal language model, not with task={self.task!r}")
        for word in self.softmax_layers:
            if isinstance(word, str):
                from ..conversion.hedgehog import automatic_share  # which imports PyTorch

                automatic_share(word)
        transfer, long, rate = self.transfer_share or 0.0, self.long_share or 0.0, self.learning_rate or 0.0
        if transfer + long > 1:
            raise ValueError(
                f"transfer_share={self.transfer_share} and long_share={self.long_share} are together more than 1"
            )
        if transfer < 1 and not (self.logits_weight or self.task_weight):
            raise ValueError(
                "logits_weight and task_weight are both 0: behind the first stage there is nothing to learn"
            )
        self.long_learning_rate = self.long_learning_rate or 0.3 * rate
        self.transfer_length = self.transfer_length or self.block_length
        if self.long_length is not None and not self.long_share:
            raise ValueError("long_length belongs to long_share, which is 0: give a share of the steps, too")
        longest = (self.long_length or 4 * self.block_length) if self.long_share else self.block_length
        self.long_length = longest if self.long_share else None
        for name in ("transfer_length", "block_length"):
            if longest % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} must divide the longest rows, of {longest} tokens")
        if self.batch_size * self.block_length % longest:
            raise ValueError(
                f"batch_size={self.batch_size} rows of {self.block_length} tokens are no whole number of rows of {longest}: take "
                f"a multiple of {longest // self.block_length}"
            )

    @property
    def longest_rows(self) -> int:
        """Tokens in a row of the data, which stages may cut."""
        return self.long_length or self.block_length

    @classmethod
    def from_arguments(cls, given: dict[str, Any]) -> "DistillOptions":
        """Options from those given; `example` brings its own defaults, of MiniLM where that is installed."""
        if given.get("example"):
            from .distill_example import example_set, minilm_folder

            if given.get("to") == "hedgehog":
                return cls(**{**EXAMPLES["hedgehog"], **given})
            task = given.get("task") or ("classification" if minilm_folder() else "causal-lm")
            data = {"data": [example_set()]} if task == "classification" else {}
            given = {**EXAMPLES.get(task, {}), **data, "task": task, **given}
        return cls(**given)
