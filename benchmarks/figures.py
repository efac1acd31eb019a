"""Figures of docs/data by name, for the table of claims and for the sentences of the pages.

A figure in a sentence stands between two marks that a reader of the page does not see:

    <!--{lm("docs8", "gpt2"):.3f}-->1.268<!--.-->

The first holds a replacement field of an f-string, whose names are the functions of this module. `python -m benchmarks.pages`
writes what it gives, together with the tables.
"""

import json
import math
import statistics
from functools import cache
from pathlib import Path
from typing import Any

from .encoder_tasks import chosen
from .language_model_report import best_runs

DATA = Path(__file__).parents[1] / "docs" / "data"


@cache
def data(path: str) -> Any:
    """What a file of docs/data holds."""
    return json.loads((DATA / path).read_text())


def h200(suite: str, name: str, length: int, figure: str = "ktokens_per_s") -> float:
    """A figure of one contender at one length of a suite on the H200."""
    cases = data(f"h200-{suite}.json")["cases"]
    return next(case[figure] for case in cases if (case["name"], case["length"]) == (name, length))


def times(suite: str, ours: str, theirs: str, length: int) -> float:
    """How many times as fast one contender is as another one."""
    return h200(suite, ours, length) / h200(suite, theirs, length)


def listed(values, digits: int = 3) -> str:
    """As in "1.27, 1.67 and 57.3"."""
    *first, last = (f"{value:.{digits}g}" for value in values)
    return f"{', '.join(first)} and {last}"


def all_times(suite: str, ours: str, theirs: str, *lengths: int) -> str:
    """The same at several lengths."""
    return listed(times(suite, ours, theirs, length) for length in lengths)


def memory(suite: str, ours: str, theirs: str, length: int) -> float:
    """The share that one contender's peak memory is of another one's."""
    return h200(suite, ours, length, "peak_gib") / h200(suite, theirs, length, "peak_gib")


def all_memory(suite: str, ours: str, theirs: str, *lengths: int) -> str:
    """The same at several lengths."""
    return listed((memory(suite, ours, theirs, length) for length in lengths), digits=2)


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
    found = data("encoder-tasks/encoder-tasks.json")["pretraining"]
    return next(run[split][figure] for run in found if run["family"] == family)


def long_range(task: str, model: str, figure: str = "test") -> float:
    """Mean over the seeds on a long-range task."""
    files = sorted((DATA / "long-range").glob(f"{task}-{model}-seed*.json"))
    return statistics.mean(json.loads(file.read_text())[figure] for file in files)


def faithful(model: str, method: str, share: float, against: str = "random", of: str = "top") -> float:
    """How many times as far the prediction moves where an explanation's tokens are deleted, mean over the seeds."""
    files = sorted((DATA / "faithfulness").glob(f"{model}-seed*.json"))
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    kept = [row for row in rows if (row["method"], row["share"]) == (method, share)]
    return statistics.mean(row[of] for row in kept) / (statistics.mean(row[against] for row in kept) if against else 1)


def cpu(file: str, job: str, contender: str, figure: str = "speed_ratio") -> float:
    """A figure of the benchmarks on a CPU: the job and the contender whose names begin like this."""
    rows = data(f"cpu-{file}.json")["rows"]
    return next(row[figure] for row in rows if row["job"].startswith(job) and row["contender"].startswith(contender))
