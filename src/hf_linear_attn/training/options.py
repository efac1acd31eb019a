"""Every knob of `hf-linear-attn train`, once: default, meaning, legal range.
Light to import, so that `--help` answers at once.
"""

# ruff: noqa: RUF009  (`option` is `dataclasses.field` with a help text)

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..modeling.whole_files import write_whole

OPTIONS_FILE = "training_options.json"
FAMILIES = ("leap", "fastformer", "danet", "gpt2", "bert")
TASKS = ("causal-lm", "mlm", "classification")
# Families that see both sides of a word, and so can guess a masked one.
ENCODERS = ("danet", "bert")
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("float32", "bfloat16", "float16")
# What a resumed run may change: none of these alters the loss curve.
FREE_ON_RESUME = {
    "output",
    "resume",
    "overwrite",
    "quiet",
    "threads",
    "keep_checkpoints",
    "save_every",
    "final_eval_tokens",
}


def option(default: Any, group: str, help: str, kind: type = str, choices: tuple = (), metavar: str | None = None):
    """Declare a field of the options together with what the command line shows for it.
    A list default takes several values.
    """
    about = {"group": group, "help": help, "kind": kind, "choices": choices, "metavar": metavar}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


def key_values(pairs: list[str], name: str) -> dict[str, Any]:
    """KEY=VALUE words as a dictionary, values read as JSON where they are JSON, else as text. ValueError names `name`."""
    found = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.isidentifier():
            raise ValueError(f"{name} takes KEY=VALUE, as in initializer_range=0.02, got {pair!r}")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


@dataclass
class TrainingOptions:
    """Options of one training run. Constructing them checks every value;
    ValueError names the field and its legal range.
    """

    # The model.
    task: str = option(
        "causal-lm",
        "model",
        "what is learnt: the next word, masked words (mlm), or the class of a text",
        choices=TASKS,
    )
    family: str | None = option(
        None, "model", "model family (default: leap; danet for mlm and classification)", choices=FAMILIES
    )
    from_checkpoint: str | None = option(
        None, "model", "start from the weights, tokenizer and sizes of this trained model", metavar="FOLDER"
    )
    causal: bool = option(
        False,
        "model",
        "the decoder of a family that has an encoder, too (danet); the other families always are one",
        bool,
    )
    hidden_size: int = option(128, "model", "width of the residual stream", int)
    num_hidden_layers: int = option(4, "model", "number of blocks", int)
    num_attention_heads: int = option(2, "model", "attention heads; head sizes near 64 work best", int)
    windows: str | None = option(
        None, "model", "window of each layer, as in global,4,8,16 (default: the family's own)", metavar="W,W,..."
    )
    all_global: bool = option(False, "model", "no windows: every layer sees the whole past", bool)
    position_embedding: str | None = option(
        None, "model", "how positions enter (leap: learned by default; danet: rotary)", choices=("learned", "rotary")
    )
    dropout: float = option(0.0, "model", "dropout probability everywhere in the model, 0 <= p < 1", float)
    config: list[str] = option(
        [], "model", "any other field of the model's config, as in initializer_range=0.02", metavar="KEY=VALUE"
    )

    # The text.
    data: list[str] = option(
        [],
        "text",
        "training files or folders: .txt, .jsonl, .csv, .parquet; for classification also a set: speeches, "
        "spam-assassin, r8, bbc",
        metavar="FILE",
    )
    validation_data: list[str] = option(
        [], "text", "validation files (default: 5%% of the training text)", metavar="FILE"
    )
    test_data: list[str] = option([], "text", "test files (default: 5%% of the training text)", metavar="FILE")
    dataset: str | None = option(
        None, "text", "data set of the Hub instead of files, as in Salesforce/wikitext", metavar="NAME"
    )
    dataset_config: str | None = option(None, "text", "its configuration, as in wikitext-2-raw-v1", metavar="NAME")
    text_column: str = option("text", "text", "column that holds the text")
    label_column: str = option("label", "text", "column that holds the class of a text, for classification")
    join_rows: bool = option(False, "text", "rows are lines of one text, not documents", bool)
    tokenizer: str | None = option(
        None, "text", "existing tokenizer, folder or Hub name (default: train a BPE)", metavar="NAME"
    )
    vocab_size: int = option(
        4096, "text", "size of the byte-level BPE that is trained on the training text, at least 259", int
    )
    block_length: int = option(512, "text", "tokens in one training row; of a longer classified text, the first", int)
    mask_share: float = option(0.15, "text", "share of the tokens that mlm hides, 0 < p < 1", float)

    # The optimisation.
    steps: int | None = option(None, "optimisation", "optimizer steps (default: one epoch)", int)
    epochs: float | None = option(None, "optimisation", "passes over the training text, instead of --steps", float)
    batch_size: int = option(2, "optimisation", "rows in one step on a device", int)
    accumulate: int = option(1, "optimisation", "batches added up before an optimizer step", int)
    learning_rate: float | None = option(
        None, "optimisation", "peak learning rate of AdamW (default: 3e-3; 5e-4 for classification)", float
    )
    schedule: str = option("linear", "optimisation", "decay of the learning rate", choices=SCHEDULES)
    warmup: float = option(0.05, "optimisation", "share of the steps in which the rate rises, 0 <= w < 1", float)
    weight_decay: float = option(0.01, "optimisation", "weight decay of AdamW", float)
    clip: float = option(1.0, "optimisation", "largest gradient norm", float)
    precision: str = option("float32", "optimisation", "arithmetic of the forward pass (autocast)", choices=PRECISIONS)
    gradient_checkpointing: bool = option(False, "optimisation", "recompute activations: less memory, more time", bool)
    compile: bool = option(False, "optimisation", "torch.compile the model", bool)
    cpu: bool = option(False, "optimisation", "stay on the CPU even if there is an accelerator", bool)
    threads: int | None = option(None, "optimisation", "CPU threads (default: PyTorch's choice)", int)
    seed: int = option(0, "optimisation", "seed of the weights, the dropout and the order of the batches", int)

    # The run.
    output: str = option(
        "outputs/train", "run", "folder for the model, its checkpoints, curve and report", metavar="FOLDER"
    )
    resume: bool = option(False, "run", "continue the interrupted run in the output folder, with its own options", bool)
    overwrite: bool = option(False, "run", "replace an earlier run in the output folder", bool)
    log_every: int = option(20, "run", "steps between two points of the training curve", int)
    eval_every: int | None = option(None, "run", "steps between two evaluations (default: a tenth of the run)", int)
    eval_tokens: int = option(50_000, "run", "validation tokens of such an evaluation, from all over the split", int)
    final_eval_tokens: int | None = option(
        None, "run", "the same for the final evaluation of validation and test (default: all)", int
    )
    save_every: int | None = option(None, "run", "steps between two checkpoints (default: a tenth of the run)", int)
    keep_checkpoints: int = option(2, "run", "newest checkpoints that stay on disk", int)
    quiet: bool = option(False, "run", "no progress bar", bool)

    def __post_init__(self):
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ValueError(f"{each.name} must be one of {', '.join(choices)}, got {value!r}")
        if self.learning_rate is None:
            self.learning_rate = 5e-4 if self.task == "classification" else 3e-3
        positive = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "batch_size",
            "accumulate",
            "learning_rate",
            "clip",
        )
        positive += (
            "steps",
            "epochs",
            "threads",
            "log_every",
            "eval_every",
            "eval_tokens",
            "final_eval_tokens",
            "save_every",
        )
        positive += ("keep_checkpoints",)
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.block_length < 2:
            raise ValueError(f"block_length must be at least 2 (a token and its successor), got {self.block_length}")
        if self.vocab_size < 259:
            raise ValueError(f"vocab_size must be at least 259 (256 bytes and 3 special tokens), got {self.vocab_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}"
            )
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.data and self.dataset:
            raise ValueError("give data (files) or dataset (a name on the Hub), not both")
        if self.resume and self.overwrite:
            raise ValueError("resume continues the run that overwrite would replace: give one of the two")
        if self.windows is not None and self.all_global:
            raise ValueError("windows and all_global contradict each other: give one of the two")
        self._check_task()
        self.layer_windows()
        self.config_fields()

    def _check_task(self) -> None:
        """Family, checkpoint and text that fit the task; fills in the family where none is named."""
        if self.from_checkpoint is not None:
            default = {each.name: each.default for each in fields(self)}
            of_a_new_model = [
                "causal",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "windows",
                "all_global",
            ]
            of_a_new_model += ["position_embedding", "tokenizer", "vocab_size"]
            for name in of_a_new_model:
                if getattr(self, name) != default[name]:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} belongs to a new model, and from_checkpoint has its own"
                    )
        elif self.family is None:
            self.family = "leap" if self.task == "causal-lm" else "danet"
        if self.task == "mlm" and (self.causal or self.family not in (*ENCODERS, None)):
            got = "causal" if self.causal else f"family {self.family!r}"
            raise ValueError(
                f"task mlm needs a model that sees both sides of a word: {' or '.join(ENCODERS)}, not {got}"
            )
        if self.task == "causal-lm" and self.family == "bert":
            raise ValueError("bert is an encoder: give task mlm or classification, or another family")
        if not 0 < self.mask_share < 1:
            raise ValueError(f"mask_share must be greater than 0 and less than 1, got {self.mask_share}")
        if self.task == "classification" and (self.dataset or self.join_rows):
            raise ValueError("classification reads data (files or a named set), neither dataset nor join_rows")

    def layer_windows(self) -> list[int | None] | None:
        """The windows as a config wants them, None for a global layer: "global,4" -> [None, 4]."""
        if self.windows is None:
            return None
        parsed: list[int | None] = []
        for word in self.windows.split(","):
            word = word.strip().lower()
            if word in ("global", "none"):
                parsed.append(None)
            elif word.isdigit() and int(word) > 0:
                parsed.append(int(word))
            else:
                raise ValueError(f"windows must list 'global' or positive sizes, as in global,4,8,16, got {word!r}")
        if len(parsed) != self.num_hidden_layers:
            raise ValueError(f"windows lists {len(parsed)} layers, and num_hidden_layers is {self.num_hidden_layers}")
        return parsed

    def config_fields(self) -> dict[str, Any]:
        """The KEY=VALUE pairs of `config`."""
        return key_values(self.config, "config")

    def save(self, folder: Path) -> None:
        """Write the options beside the run, for `resume` and for whoever wants to know later."""
        write_whole(folder / OPTIONS_FILE, lambda part: part.write_text(json.dumps(asdict(self), indent=2) + "\n"))

    @classmethod
    def load(cls, folder: Path) -> "TrainingOptions":
        """Read what `save` wrote. ValueError where the folder holds no run."""
        file = folder / OPTIONS_FILE
        if not file.exists():
            raise ValueError(
                f"there is no run to resume in {str(folder)!r} ({OPTIONS_FILE} is missing): train without resume"
            )
        return cls(**json.loads(file.read_text()))

    @classmethod
    def for_resume(cls, given: dict[str, Any]) -> "TrainingOptions":
        """Options of the run in given["output"]; other given values must be equal to the run's, or must not touch its
        curve.
        """
        folder = Path(given.get("output", cls.output))
        saved = asdict(cls.load(folder))
        for name, value in given.items():
            if name not in FREE_ON_RESUME and value != saved[name]:
                raise ValueError(
                    f"the run in {str(folder)!r} has {name}={saved[name]!r}, so resuming with {name}={value!r} would "
                    f"bend its loss curve: leave {name} out, or start a new run in another output folder"
                )
        return cls(**{**saved, **{"overwrite": False}, **given, "resume": True})
