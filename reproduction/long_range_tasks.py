"""Long sequences with a class each: ListOps from its published grammar, and pictures read pixel by pixel.

A task is an array of token ids (rows, length) in uint8, 0 behind the end of a row, with lengths and labels; so it fits on a GPU
as a whole.
"""

import gzip
import multiprocessing
import random
import statistics
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# ListOps: digits, four operators, the closing bracket. 0 is padding.
DIGIT, CLOSE = 1, 15
OPERATORS = {
    11: min,  # [MIN
    12: max,  # [MAX
    13: lambda values: int(statistics.median(values)),  # [MED
    14: lambda values: sum(values) % 10,  # [SM: sum modulo 10
}
WORDS = [" ", *map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]"]
ROWS_OF_A_CHUNK = 250
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Split:
    """ids: (rows, length) uint8, 0 behind the end. lengths: (rows,). labels: (rows,)."""

    ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Grammar:
    """Sizes of ListOps expressions; the defaults are those of Long Range Arena."""

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_arguments: int = 10
    digit_probability: float = 0.75


# For machines without an accelerator: expressions of 10 to 40 tokens.
SHORT_GRAMMAR = Grammar(10, 40, 3, 4, 0.7)


class _TooLong(Exception):
    pass


def expression(rng: random.Random, grammar: Grammar) -> tuple[list[int], int] | None:
    """One expression and its value; None if its length is not strictly between the grammar's two."""
    ids: list[int] = []

    def grow(depth: int) -> int:
        if depth > 1 and (depth >= grammar.max_depth or rng.random() < grammar.digit_probability):
            digit = rng.randrange(10)
            ids.append(DIGIT + digit)
            return digit
        operator = rng.choice((11, 12, 13, 14))
        ids.append(operator)
        if len(ids) > grammar.max_length:
            raise _TooLong
        values = [grow(depth + 1) for _ in range(rng.randint(2, grammar.max_arguments))]
        ids.append(CLOSE)
        return OPERATORS[operator](values)

    try:
        value = grow(1)
    except _TooLong:
        return None
    return (ids, value) if grammar.min_length < len(ids) < grammar.max_length else None


def _chunk(job: tuple[int, int, Grammar]) -> list[tuple[bytes, int]]:
    seed, count, grammar = job
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        if (made := expression(rng, grammar)) is not None:
            rows.append((bytes(made[0]), made[1]))
    return rows


def listops(sizes: dict[str, int], grammar: Grammar, seed: int = 0, processes: int = 1) -> dict[str, Split]:
    """That many different expressions for each split. The result does not depend on `processes`."""
    wanted = sum(sizes.values())
    seen: dict[bytes, int] = {}
    chunk = 0
    with multiprocessing.Pool(processes) as pool:
        while len(seen) < wanted:
            count = max(1, -(-(wanted - len(seen)) // ROWS_OF_A_CHUNK))
            jobs = [(seed * 1_000_003 + chunk + i, ROWS_OF_A_CHUNK, grammar) for i in range(count)]
            chunk += count
            for rows in pool.imap(_chunk, jobs):
                seen.update((ids, value) for ids, value in rows if ids not in seen)
    found, made, start = list(seen.items()), {}, 0
    for name, size in sizes.items():
        rows = found[start : start + size]
        start += size
        lengths = np.array([len(ids) for ids, _ in rows])
        ids = np.zeros((size, lengths.max()), np.uint8)
        for row, (text, _) in zip(ids, rows, strict=True):
            row[: len(text)] = np.frombuffer(text, np.uint8)
        made[name] = Split(ids, lengths, np.array([value for _, value in rows]))
    return made


def fashion_mnist(folder: Path, sizes: dict[str, int] | None = None) -> dict[str, Split]:
    """Pictures of 28x28 pixels as rows of 784 ids, 0 to 255: the brightness.

    folder: the .gz files of Debian's dataset-fashion-mnist. Validation is the end of the training pictures.
    """
    arrays = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        pair = []
        for kind in ("images-idx3", "labels-idx1"):
            file = folder / f"{stem}-{kind}-ubyte.gz"
            if not file.exists():
                raise FileNotFoundError(
                    f"{file} is missing. On Debian: apt-get install dataset-fashion-mnist (31 MB), or apt-get download "
                    "dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb FOLDER; the task 'digits' needs no download"
                )
            raw = gzip.decompress(file.read_bytes())
            shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
            pair.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape[0], -1))
        arrays[split] = pair
    sizes = sizes or {"train": 55_000, "validation": 5_000, "test": 10_000}
    images, labels = arrays["train"]
    last = len(images) - sizes["validation"]
    return {
        "train": _pictures(images[: min(sizes["train"], last)], labels),
        "validation": _pictures(images[last:], labels[last:]),
        "test": _pictures(*(each[: sizes["test"]] for each in arrays["test"])),
    }


def digits() -> dict[str, Split]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels with 17 levels: rows of 64. In the package, nothing to download."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].astype(np.uint8), labels[order]
    return {
        "train": _pictures(images[:1297], labels[:1297]),
        "validation": _pictures(images[1297:1547], labels[1297:1547]),
        "test": _pictures(images[1547:], labels[1547:]),
    }


def _pictures(images: np.ndarray, labels: np.ndarray) -> Split:
    labels = labels.reshape(-1)[: len(images)].astype(np.int64)
    return Split(images, np.full(len(images), images.shape[1]), labels)


def save(splits: dict[str, Split], path: Path) -> None:
    """One compressed file, for a machine that has neither the package nor the time."""
    arrays = {f"{s}_{k}": getattr(split, k) for s, split in splits.items() for k in ("ids", "lengths", "labels")}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def load(path: Path) -> dict[str, Split]:
    """What `save` wrote."""
    with np.load(path) as arrays:
        names = list(dict.fromkeys(key.split("_")[0] for key in arrays.files))
        numbers = {key: arrays[key] if key.endswith("ids") else arrays[key].astype(np.int64) for key in arrays.files}
    return {s: Split(*(numbers[f"{s}_{k}"] for k in ("ids", "lengths", "labels"))) for s in names}
