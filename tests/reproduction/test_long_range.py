"""Long-range tasks: expressions mean what they say, pictures are read, models learn on two cores in seconds."""

import gzip
import random
import struct

import numpy as np
import pytest
import torch

from reproduction import long_range
from reproduction import long_range_tasks as tasks
from reproduction.__main__ import main

pytestmark = pytest.mark.slow


def value_of(words):
    """Value of a ListOps expression by a stack: an evaluator of its own beside the generator's."""
    stack = []
    for word in words:
        if word == "]":
            values = []
            while not isinstance(stack[-1], str):
                values.append(stack.pop())
            operator = stack.pop()
            values.sort()
            middle = len(values) // 2
            median = values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) // 2
            stack.append({"[MIN": values[0], "[MAX": values[-1], "[MED": median, "[SM": sum(values) % 10}[operator])
        else:
            stack.append(word if word.startswith("[") else int(word))
    assert len(stack) == 1
    return stack[0]


@pytest.mark.parametrize(("grammar", "sizes"), [(tasks.SHORT_GRAMMAR, (300, 50)), (tasks.Grammar(), (20, 5))])
def test_expressions_have_their_value_and_length(grammar, sizes):
    splits = tasks.listops(dict(zip(("train", "test"), sizes, strict=True)), grammar)
    seen = set()
    for split, size in zip(splits.values(), sizes, strict=True):
        assert len(split.labels) == size
        for ids, length, label in zip(split.ids, split.lengths, split.labels, strict=True):
            words = [tasks.WORDS[i] for i in ids[:length]]
            assert not ids[length:].any()
            assert value_of(words) == label
            assert grammar.min_length < length < grammar.max_length
            seen.add(tuple(words))
    assert len(seen) == sum(sizes), "an expression came twice"


def test_expressions_are_those_of_the_seed_whatever_the_number_of_processes():
    one, two = (tasks.listops({"train": 600}, tasks.SHORT_GRAMMAR, seed=3, processes=n)["train"] for n in (1, 2))
    np.testing.assert_array_equal(one.ids, two.ids)
    assert tasks.expression(random.Random(0), tasks.Grammar(1, 3, 2, 3)) is None


def test_pictures_are_read_from_the_published_files(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    for stem in ("train", "t10k"):
        header = struct.pack(">IIII", 0x803, 30, 28, 28)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        labels = struct.pack(">II", 0x801, 30) + bytes(range(10)) * 3
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    splits = tasks.fashion_mnist(tmp_path, {"train": 25, "validation": 5, "test": 4})
    assert [len(split.labels) for split in splits.values()] == [25, 5, 4]
    np.testing.assert_array_equal(splits["validation"].ids[0], images[25].reshape(-1))
    assert splits["train"].labels[13] == 3
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        tasks.fashion_mnist(tmp_path / "absent")


def test_batches_show_every_row_once_without_cutting_any():
    splits = tasks.listops({"train": 100}, tasks.SHORT_GRAMMAR)
    rows = long_range.Rows(splits["train"], "cpu")
    seen = 0
    for batch in rows.epoch(10, np.random.default_rng(0)):
        assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != 0)
        seen += batch["attention_mask"].sum().item()
    assert seen == splits["train"].lengths.sum()
    both = [list(rows.epoch(10, np.random.default_rng(1))) for _ in range(2)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("task", ["listops", "fashion"])
def test_both_models_have_one_size(task):
    sizes = []
    for name in long_range.MODELS:
        with torch.device("meta"):
            model = long_range.build(name, task, long_range.PUBLISHED[task], 2000)
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert max(sizes) < 1.05 * min(sizes)


def test_saved_rows_come_back(tmp_path):
    splits = tasks.listops({"train": 20, "test": 5}, tasks.SHORT_GRAMMAR)
    tasks.save(splits, tmp_path / "rows.npz")
    back = tasks.load(tmp_path / "rows.npz")
    for name, split in splits.items():
        for field in ("ids", "lengths", "labels"):
            np.testing.assert_array_equal(getattr(back[name], field), getattr(split, field))


def test_danet_learns_digits_pixel_by_pixel(tmp_path, capsys):
    words = [
        "long-range",
        "run",
        "--task",
        "digits",
        "--models",
        "danet",
        "--steps",
        "120",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    main([*words, "--output", str(tmp_path)])
    main(["long-range", "table", "--output", str(tmp_path)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| digits | danet"))
    assert float(line.split("|")[4]) > 40, "chance is 10 %"
