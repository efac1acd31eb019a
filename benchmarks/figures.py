"""Figures of docs/data by name, for the table of published claims and for the sentences of the pages.

What docs/claims.toml can ask for are the functions in `LOOKUPS`; `benchmarks.sentences` reads that file.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from reproduction.encoder_tasks import chosen
from reproduction.language_model_report import best_runs

DATA = Path(__file__).parents[1] / "docs" / "data"


@cache
def data(path: str) -> Any:
    """What a file of docs/data holds."""
    return json.loads((DATA / path).read_text())


def entry(file: str, path: Sequence[str | int | dict]) -> Any:
    """What stands at a path in a file of docs/data: keys, places in lists, and fields that one entry of a list has."""
    found = data(file)
    for step in path:
        if isinstance(step, dict):
            fitting = [each for each in found if all(each.get(key) == value for key, value in step.items())]
            if not fitting:
                raise ValueError(f"{file}: no entry with {step}")
            found = fitting[0]
        else:
            found = found[step]
    return found


def h200(suite: str, name: str, length: int, figure: str = "ktokens_per_s") -> float:
    """A figure of one contender at one length of a suite on the H200."""
    return entry(f"h200-{suite}.json", ["cases", {"name": name, "length": length}, figure])


def times(suite: str, ours: str, theirs: str, length: int) -> float:
    """How many times as fast one contender is as another one."""
    return h200(suite, ours, length) / h200(suite, theirs, length)


def memory(suite: str, ours: str, theirs: str, length: int) -> float:
    """The share that one contender's peak memory is of another one's."""
    return h200(suite, ours, length, "peak_gib") / h200(suite, theirs, length, "peak_gib")


def of_limit(suite: str, name: str, length: int, counted: str | None = None) -> float:
    """The share of the matrix units' limit that a contender reaches, by the operations that it or the one `counted` does."""
    return h200(suite, name, length) / h200(suite, counted or name, length, "limit_ktokens_per_s")


def runs(corpus: str, model: str) -> list[dict]:
    """All runs of a language model on a text of the comparison on one budget."""
    return [run for run in data("language-models.json")[corpus].get("runs", []) if run["model"] == model]


def lm(corpus: str, model: str, figure: str | None = None, seed: int | None = None) -> float:
    """Mean over the seeds (or one seed) at the best rate: perplexity of the speeches, bits per byte of docs8."""
    figure = figure or ("bits_per_byte" if corpus.startswith("docs8") else "perplexity")
    best = best_runs(runs(corpus, model))
    return statistics.mean(run["test"][figure] for run in best if seed is None or run["seed"] == seed)


def share(corpus: str, tried: str, ours: str, aim: str) -> float:
    """How much of the way from our model to another one what was tried goes, first seed."""
    start, end, reached = (lm(corpus, name, seed=0) for name in (ours, aim, tried))
    return (start - reached) / (start - end)


def paper(model: str) -> float:
    """Mean test perplexity of the seeds at the setting of LEAP's paper."""
    files = sorted((DATA / "paper").glob(f"paper-{model}-seed*.json"))
    return statistics.mean(json.loads(file.read_text())["test"]["perplexity"] for file in files)


def sea_language(name: str, k: int | None = None) -> float:
    """Perplexity of SmolLM2 or a student of it."""
    found = data(f"sea-language/{name}.json")
    return (found if k is None else found["with_other_k"][str(k)])["perplexity"]


def sea_of_teacher(name: str, k: int | None = None) -> float:
    """That perplexity divided by the teacher's on the same rows."""
    found = data(f"sea-language/{name}.json")
    found = found if k is None else found["with_other_k"][str(k)]
    return found["perplexity"] / math.exp(found["teacher_loss"])


def sea_cells(kind: str, cells: int, first: int, last: int) -> float:
    """Share of SmolLM2's attention that 64 keys of such cells hold, mean over layers first to last."""
    return statistics.mean(layer[kind][str(cells)] for layer in data("sea-cells.json")["layers"][first : last + 1])


def sea_accuracy(texts: str, k: int | None = None, recipe: str = "") -> float:
    """Accuracy of MiniLM (k None) or of its student with k keys a query."""
    found = data(f"sea-classification/{recipe}{texts}-seed0.json")
    return found["teacher"]["accuracy"] if k is None else found["students"][str(k)]["accuracy"]


def encoder(texts: str, family: str, figure: str = "accuracy", start: str = "pretrained", folder: str = "") -> float:
    """Mean over the seeds of a fine-tuned encoder's test figure, at the choice with the best validation accuracy."""
    _, of_choice, _ = chosen(data(f"encoder-tasks/{folder}encoder-tasks.json")["finetuning"])[texts, family, start]
    return statistics.mean(run["test"][figure] for run in of_choice)


def encoder_tried(texts: str, family: str, rate: float, change: str = "", folder: str = "") -> float:
    """Validation accuracy of one choice with the first seed."""
    _, _, tried = chosen(data(f"encoder-tasks/{folder}encoder-tasks.json")["finetuning"])[texts, family, "pretrained"]
    return tried[rate, change]


def words(family: str, split: str = "test", figure: str = "accuracy") -> float:
    """Of masked words, after the encoders' pre-training."""
    return entry("encoder-tasks/encoder-tasks.json", ["pretraining", {"family": family}, split, figure])


def long_range(task: str, model: str, figure: str = "test") -> float:
    """Mean over the seeds on a long-range task."""
    files = sorted((DATA / "long-range").glob(f"{task}-{model}-seed*.json"))
    return statistics.mean(json.loads(file.read_text())[figure] for file in files)


def faithful(model: str, method: str, share: float, against: str = "random", column: str = "top") -> float:
    """How many times as far the prediction moves where an explanation's tokens are deleted, mean over the seeds.

    With `against=""` the distance itself.
    """
    files = sorted((DATA / "faithfulness").glob(f"{model}-seed*.json"))
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    kept = [row for row in rows if (row["method"], row["share"]) == (method, share)]
    moved = statistics.mean(row[column] for row in kept)
    return moved / statistics.mean(row[against] for row in kept) if against else moved


def cpu(file: str, job: str, contender: str, figure: str = "speed_ratio") -> float:
    """A figure of the benchmarks on a CPU: the job and the contender whose names begin like this."""
    rows = data(f"cpu-{file}.json")["rows"]
    return next(row[figure] for row in rows if row["job"].startswith(job) and row["contender"].startswith(contender))


LOOKUPS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        cpu,
        encoder,
        encoder_tried,
        entry,
        faithful,
        h200,
        lm,
        long_range,
        memory,
        of_limit,
        paper,
        sea_accuracy,
        sea_cells,
        sea_language,
        sea_of_teacher,
        share,
        times,
        words,
    )
}
