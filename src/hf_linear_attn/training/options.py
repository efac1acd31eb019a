"""Every knob of `hf-linear-attn train`, once: default, meaning, legal range.
Light to import, so that `--help` answers at once.
"""

# ruff: noqa: RUF009  (`option` is `dataclasses.field` with a help text)

# Not Transformers' TrainingArguments and HfArgumentParser, which these options and `cli/parser.py` resemble: their import takes
# seconds, while `--help` or a mistyped option is answered at once here; and most of their hundred and more arguments would be
# offered without a range and without meaning for a resumed run. `language_modeling.training_arguments` makes Trainer's of these.

import json
import os
from collections.abc import Callable
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..families import TASKS as AUTO_CLASSES
from ..families import sized, tasks_of
from .files import write_text_whole
from .number_range import (
    COUNT,
    EPOCHS,
    LARGEST_INT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    THREADS,
    VOCABULARY,
    NumberRange,
)

OPTIONS_FILE = "training_options.json"
FAMILIES = tuple(sized())
TASKS = tuple(AUTO_CLASSES)
# Families that see both sides of a word, and so can guess a masked one.
ENCODERS = tuple(name for name in FAMILIES if "mlm" in tasks_of(name))
DEFAULTS = {task: name for name, sizes in sized().items() for task in sizes.default_for}
OTHER_DEFAULTS = ", ".join(f"{name} for {task}" for task, name in DEFAULTS.items() if task != "causal-lm")
DECODERS_TOO = ", ".join(name for name, sizes in sized().items() if sizes.decoder)
PRESETS = tuple(dict.fromkeys(name for sizes in sized().values() for name in sizes.presets))
PRESET_FAMILIES = ", ".join(name for name, sizes in sized().items() if sizes.presets)
KIND_FAMILIES = ", ".join(name for name, sizes in sized().items() if sizes.kinds)
POSITIONS = tuple(dict.fromkeys(kind for sizes in sized().values() for kind in sizes.positions))
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("float32", "bfloat16", "float16")
# What a resumed run may change: none of these alters the loss curve.
FREE_ON_RESUME = frozenset(
    {"output", "resume", "overwrite", "quiet", "threads", "keep_checkpoints", "save_every", "final_eval_tokens"}
)


def path(text: str) -> str:
    """Kind of an option that names a file or folder, or may: `~` and `~user` become the home folder, which a shell leaves alone
    in --output=~/run and within quotes.
    """
    return os.path.expanduser(text)


def option(
    default: Any,
    group: str,
    help: str,
    kind: Callable[[str], Any] = str,
    choices: tuple = (),
    metavar: str | None = None,
    range: NumberRange | None = None,
):
    """Declare a field of the options together with what the command line shows for it.
    A list default takes several values; a number without a range is a count, at least 1.
    """
    range = range or (COUNT if kind is int else POSITIVE if kind is float else None)
    about = {"group": group, "help": help, "kind": kind, "choices": choices, "metavar": metavar, "range": range}
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
            found[key] = json.loads(text, parse_constant=_no_number)
        except json.JSONDecodeError:
            found[key] = text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: the value of {key} cannot be used: {error}") from None
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number to compute with")


def check_values(options: Any) -> None:
    """Refuse what the fields of an options dataclass do not allow: ValueError names the field, its range and the value."""
    for each in fields(options):
        value, about = getattr(options, each.name), each.metadata
        several = isinstance(value, list | tuple)
        for one in value if several else [value]:
            if one is None and not several:
                continue
            if about["choices"] and one not in about["choices"]:
                raise ValueError(f"{each.name} must be one of {', '.join(about['choices'])}, got {one!r}")
            if about["range"] is not None and isinstance(one, int | float):
                problem = about["range"].problem(one)
                if problem:
                    raise ValueError(f"{each.name} {problem}")
            if about["kind"] in (str, path) and one == "":
                raise ValueError(f"{each.name} is empty: give a value, or leave it out")


@dataclass
class RunOptions:
    """What the options of `train` and `distill` have in common: they lie in the run's folder, where a resumed run finds them."""

    # Without annotations, which would make fields of them.
    file_name = ""
    command = ""
    free_on_resume = frozenset[str]()

    def expand_paths(self) -> None:
        """Put the home folder in the place of `~` in every path."""
        for each in fields(self):
            setattr(self, each.name, _expanded(each, getattr(self, each.name)))

    def save(self, folder: Path, run_id: str | None = None) -> None:
        """Write the options beside the run, for `resume` and for whoever wants to know later.

        run_id: mark that the checkpoints of the run bear, too, so that they are not taken for those of another one.
        """
        mark = {} if run_id is None else {"run_id": run_id}
        write_text_whole(folder / self.file_name, json.dumps(mark | asdict(self), indent=2) + "\n")

    @classmethod
    def load_marked(cls, folder: Path) -> tuple[Any, str | None]:
        """What `save` wrote: options and mark (None in a folder of version 0.1.0). ValueError where the folder holds no run."""
        file = folder / cls.file_name
        if not file.exists():
            raise ValueError(
                f"there is no run to resume in {str(folder)!r} ({cls.file_name} is missing): {cls.command} without resume"
            )
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            mark = saved.pop("run_id", None)
            return cls(**saved), mark
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the options of the run in {str(folder)!r} cannot be used ({cls.file_name}: {error}): start it again with "
                "overwrite, or name another folder"
            ) from error

    @classmethod
    def load(cls, folder: Path) -> Any:
        """The options that `save` wrote. ValueError where the folder holds no run."""
        return cls.load_marked(folder)[0]

    @classmethod
    def for_resume(cls, given: dict[str, Any]) -> Any:
        """Options of the run in given["output"]; other given values must be equal to the run's, or must not touch its
        curve.
        """
        known = {each.name: each for each in fields(cls)}
        given = {name: _expanded(known[name], value) if name in known else value for name, value in given.items()}
        folder = Path(given.get("output", known["output"].default))
        saved = asdict(cls.load(folder))
        for name, value in given.items():
            if name not in cls.free_on_resume and value != saved[name]:
                raise ValueError(
                    f"the run in {str(folder)!r} has {name}={saved[name]!r}, so resuming with {name}={value!r} would "
                    f"bend its loss curve: leave {name} out, or start a new run in another output folder"
                )
        return cls(**{**saved, "overwrite": False, **given, "output": str(folder), "resume": True})


def _expanded(each: Field, value: Any) -> Any:
    if each.metadata["kind"] is not path or value is None:
        return value
    return [path(word) for word in value] if isinstance(value, list) else path(value)


@dataclass
class TrainingOptions(RunOptions):
    """Options of one training run. Constructing them checks every value;
    ValueError names the field and its legal range.
    """

    file_name = OPTIONS_FILE
    command = "train"
    free_on_resume = FREE_ON_RESUME

    # The model.
    task: str = option(
        "causal-lm",
        "model",
        "what is learnt: the next word, masked words (mlm), or the class of a text",
        choices=TASKS,
    )
    family: str | None = option(
        None, "model", f"model family (default: {DEFAULTS['causal-lm']}; {OTHER_DEFAULTS})", choices=FAMILIES
    )
    from_checkpoint: str | None = option(
        None, "model", "start from the weights, tokenizer and sizes of this trained model", path, metavar="FOLDER"
    )
    causal: bool = option(
        False,
        "model",
        f"the decoder of a family that has an encoder, too ({DECODERS_TOO}); the other families always are one",
        bool,
    )
    hidden_size: int = option(128, "model", "width of the residual stream", int)
    num_hidden_layers: int = option(4, "model", "number of blocks", int)
    num_attention_heads: int = option(2, "model", "attention heads; head sizes near 64 work best", int)
    preset: str | None = option(
        None,
        "model",
        f"a family's configuration by name, which other options change ({PRESET_FAMILIES}): published; fixed-state, whose "
        "state does not grow; hybrid, which has softmax layers over the whole text (default: the sizes above)",
        choices=PRESETS,
    )
    windows: str | None = option(
        None,
        "model",
        f"window of each layer, as in global,4,8,16 (default: the family's own); {KIND_FAMILIES} also takes decay, softmax and "
        "softmax:W",
        metavar="W,W,...",
    )
    all_global: bool = option(False, "model", "no windows: every layer sees the whole past", bool)
    position_embedding: str | None = option(
        None,
        "model",
        "how positions enter: rotary (default; texts may be longer than a block) or learned",
        choices=POSITIONS,
    )
    dropout: float = option(0.0, "model", "dropout probability everywhere in the model, 0 <= p < 1", float, range=SHARE)
    config: list[str] = option(
        [], "model", "any other field of the model's config, as in initializer_range=0.02", metavar="KEY=VALUE"
    )

    # The text.
    data: list[str] = option(
        [],
        "text",
        "training files or folders: .txt, .jsonl, .csv, .parquet; for classification also a set: speeches, "
        "spam-assassin, r8, bbc",
        path,
        metavar="FILE",
    )
    validation_data: list[str] = option(
        [], "text", "validation files (default: 5%% of the training text)", path, metavar="FILE"
    )
    test_data: list[str] = option([], "text", "test files (default: 5%% of the training text)", path, metavar="FILE")
    dataset: str | None = option(
        None, "text", "data set of the Hub instead of files, as in Salesforce/wikitext", path, metavar="NAME"
    )
    dataset_config: str | None = option(None, "text", "its configuration, as in wikitext-2-raw-v1", metavar="NAME")
    text_column: str = option("text", "text", "column that holds the text")
    label_column: str = option("label", "text", "column that holds the class of a text, for classification")
    join_rows: bool = option(False, "text", "rows are lines of one text, not documents", bool)
    tokenizer: str | None = option(
        None, "text", "existing tokenizer, folder or Hub name (default: train a BPE)", path, metavar="NAME"
    )
    vocab_size: int = option(
        4096,
        "text",
        "size of the byte-level BPE that is trained on the training text, at least 259",
        int,
        range=VOCABULARY,
    )
    block_length: int = option(
        512,
        "text",
        "tokens in one training row; of a longer classified text, the first",
        int,
        range=NumberRange(least=2, most=LARGEST_INT, reason="a token and its successor at least"),
    )
    mask_share: float = option(
        0.15, "text", "share of the tokens that mlm hides, 0 < p < 1", float, range=NumberRange(above=0, below=1)
    )

    # The optimisation.
    steps: int | None = option(None, "optimisation", "optimizer steps (default: one epoch)", int)
    epochs: float | None = option(
        None, "optimisation", "passes over the training text, instead of --steps", float, range=EPOCHS
    )
    batch_size: int = option(2, "optimisation", "rows in one step on a device", int)
    accumulate: int = option(1, "optimisation", "batches added up before an optimizer step", int)
    learning_rate: float | None = option(
        None, "optimisation", "peak learning rate of AdamW (default: 3e-3; 5e-4 for classification)", float
    )
    schedule: str = option("linear", "optimisation", "decay of the learning rate", choices=SCHEDULES)
    warmup: float = option(
        0.05, "optimisation", "share of the steps in which the rate rises, 0 <= w < 1", float, range=SHARE
    )
    weight_decay: float = option(0.01, "optimisation", "weight decay of AdamW", float, range=NOT_NEGATIVE)
    clip: float = option(1.0, "optimisation", "largest gradient norm", float)
    precision: str = option("float32", "optimisation", "arithmetic of the forward pass (autocast)", choices=PRECISIONS)
    gradient_checkpointing: bool = option(False, "optimisation", "recompute activations: less memory, more time", bool)
    compile: bool = option(False, "optimisation", "torch.compile the model", bool)
    cpu: bool = option(False, "optimisation", "stay on the CPU even if there is an accelerator", bool)
    threads: int | None = option(None, "optimisation", "CPU threads (default: PyTorch's choice)", int, range=THREADS)
    seed: int = option(
        0, "optimisation", "seed of the weights, the dropout and the order of the batches", int, range=SEED
    )

    # The run.
    output: str = option(
        "outputs/train", "run", "folder for the model, its checkpoints, curve and report", path, metavar="FOLDER"
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
        self.expand_paths()
        check_values(self)
        if self.learning_rate is None:
            self.learning_rate = 5e-4 if self.task == "classification" else 3e-3
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
                "preset",
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
            self.family = DEFAULTS[self.task]
        if self.task == "mlm" and (self.causal or self.family not in (*ENCODERS, None)):
            got = "causal" if self.causal else f"family {self.family!r}"
            raise ValueError(
                f"task mlm needs a model that sees both sides of a word: {' or '.join(ENCODERS)}, not {got}"
            )
        if self.from_checkpoint is None and self.task not in tasks_of(self.family):
            raise ValueError(f"{self.family} is an encoder: give task mlm or classification, or another family")
        if self.task == "classification" and (self.dataset or self.join_rows):
            raise ValueError("classification reads data (files or a named set), neither dataset nor join_rows")

    def layer_windows(self) -> list[int | str | None] | None:
        """The windows as a config wants them, None for a global layer: "global,4,decay" -> [None, 4, "decay"]."""
        if self.windows is None:
            return None
        kinds = self.from_checkpoint is None and self.family in KIND_FAMILIES.split(", ")
        parsed: list[int | str | None] = []
        for word in self.windows.split(","):
            word = word.strip().lower()
            if word in ("global", "none"):
                parsed.append(None)
            elif word.isdecimal() and len(word) <= 10 and 0 < int(word) <= LARGEST_INT:
                parsed.append(int(word))
            elif kinds and word.partition(":")[0] in ("decay", "softmax"):
                parsed.append(word)  # its configuration says whether there is such a kind
            else:
                raise ValueError(
                    f"windows must list 'global' or sizes from 1 to {LARGEST_INT:,}, as in global,4,8,16, got {word!r}"
                )
        if len(parsed) != self.num_hidden_layers:
            raise ValueError(f"windows lists {len(parsed)} layers, and num_hidden_layers is {self.num_hidden_layers}")
        return parsed

    def config_fields(self) -> dict[str, Any]:
        """The KEY=VALUE pairs of `config`."""
        return key_values(self.config, "config")
