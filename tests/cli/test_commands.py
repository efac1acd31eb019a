"""Every command of `hf-linear-attn`: help with an example, `--json`, suggestions, exit codes, and results that are true."""

import ast
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from common.families import ROWS as VARIANTS
from common.families import rows_and
from common.tiny import FAMILY_ROWS, every_head, word_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_linear_attn import DanetConfig, DanetForCausalLM
from hf_linear_attn.checkpoint_names import no_such_folder
from hf_linear_attn.cli.generate import write_text
from hf_linear_attn.cli.main import COMMANDS, main
from hf_linear_attn.cli.quiet import quiet_libraries
from hf_linear_attn.explain import importance
from hf_linear_attn.explain.coloured_text import to_terminal
from hf_linear_attn.explain.reading import ReadText
from hf_linear_attn.hub.cards import build_card, read_report
from hf_linear_attn.hub.loading import load_model
from hf_linear_attn.training.model_choice import build_model
from hf_linear_attn.training.options import TrainingOptions
from hf_linear_attn.training.text_data import load_whole_files

every_command = pytest.mark.parametrize("name", COMMANDS)
ROWS = {row.family: row for row in FAMILY_ROWS}
BY_NAME = {row.name: row for row in VARIANTS}
GOLDEN = Path(__file__).parents[1] / "golden" / "leap.json"
TEXT = " ".join(f"w{2 + i * i % 60}" for i in range(120))


def call(words, capsys):
    """Exit code, stdout and stderr of one command."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in words])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def result(words, capsys):
    """What a command prints with `--json`: one object, and nothing else on stdout."""
    code, out, err = call([*words, "--json"], capsys)
    assert code == 0, err
    return json.loads(out)


def saved(model, folder):
    """Folder of a model with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.mask_token = "w8"  # a special token is cut out of the text first: no other word may begin with it
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def leap(tmp_path):
    """A saved language model."""
    return saved(ROWS["leap"].causal_lm(), tmp_path / "leap")


@pytest.fixture
def text(tmp_path):
    """A text of the tests' words."""
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


class TestAll:
    """What all commands have in common."""

    @every_command
    def test_help_has_an_example_and_json(self, name, capsys):
        """`--help` shows how the command is used, on lines that can be copied."""
        code, out, _ = call([name, "--help"], capsys)
        assert code == 0
        examples = out[out.index("examples:") :]
        assert re.search(rf"^  hf-linear-attn {name}\b", examples, flags=re.M)
        assert "--json" in out

    @every_command
    def test_a_mistyped_option_suggests_the_right_one(self, name, capsys):
        """Exit code 2, the suggestion, and where help is; no usage that buries it."""
        needed = {"generate": ["a", "b"], "card": ["a"], "evaluate": ["a"], "explain": ["a", "b"]}
        needed["convert"] = ["a", "b", "--to", "sea"]
        code, out, err = call([name, *needed.get(name, []), "--jsn"], capsys)
        assert (code, out) == (2, "")
        assert "did you mean '--json'" in err
        assert f"See hf-linear-attn {name} --help" in err

    def test_the_overview_names_every_command(self, capsys):
        """And a mistyped command suggests the right one."""
        code, out, _ = call(["--help"], capsys)
        assert code == 0
        assert all(re.search(rf"^  {name} ", out, flags=re.M) for name in COMMANDS)
        code, _, err = call(["evalute"], capsys)
        assert code == 2
        assert "did you mean 'evaluate'" in err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["convert", "a", "b"], "--to"),
            (["convert", "a", "b", "--to", "see"], "did you mean 'sea'"),
            (["convert", "a", "b", "--to", "leap", "--set", "k=3"], "--to sea"),
            (["convert", "a", "b", "--to", "sea", "--set", "k"], "KEY=VALUE"),
            (["evaluate", "a", "--batch-size", "0"], "--batch-size must be at least 1"),
            (["evaluate", "a", "--data", "x.txt", "--dataset", "y"], "not both"),
            (["evaluate", "a", "--split", "tset"], "did you mean 'test'"),
            (["explain", "a", "b", "--method", "rolout"], "did you mean 'rollout'"),
            (["explain", "a", "b", "--top", "0"], "--top must be at least 1"),
            (["bench", "--rounds", "0"], "--rounds must be at least 1"),
            (["bench", "--lengths", "1"], "--lengths must be at least 2"),
            (["bench", "--families", "gtp2"], "did you mean 'gpt2'"),
            (["bench", "a", "--families", "leap"], "not both"),
            (["generate", "text", "--device", "cuda:99"], "'cuda:99' cannot be used"),
            (["explain", "a", "b", "--device", "gpu"], "'gpu' cannot be used"),
        ],
        ids=lambda value: "-".join(value[:1] + value[-2:]) if isinstance(value, list) else "",
    )
    def test_wrong_calls(self, words, message, capsys):
        """Exit code 2 before anything is loaded."""
        code, _, err = call(words, capsys)
        assert code == 2
        assert message in err

    @pytest.mark.parametrize(
        "words",
        [
            ["convert", "absent", "out", "--to", "leap"],
            ["convert", "./absent", "out", "--to", "sea"],
            ["evaluate", "./absent"],
            ["bench", "./absent"],
            ["explain", "./absent", "text"],
        ],
        ids=lambda words: words[0],
    )
    def test_what_does_not_exist(self, words, tmp_path, monkeypatch, capsys):
        """One message that names it, no stack; no half-made output. What can be no name on the Hub is a wrong call (code 2)."""
        monkeypatch.chdir(tmp_path)
        code, _, err = call(words, capsys)
        assert code == (2 if "./absent" in words else 1)
        assert "absent" in err
        assert "Traceback" not in err
        assert not (tmp_path / "out").exists()

    def test_a_mistyped_folder_that_could_be_a_name_on_the_hub(self, tmp_path, monkeypatch, capsys):
        """Transformers' own message names neither the folder nor what is wrong with it when the Hub cannot be reached."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        code, _, err = call(["explain", "outputs/laep", "some text"], capsys)
        assert code == 1
        assert err.startswith("there is no folder 'outputs/laep' here: looking for a repository of that name\n")
        assert err.endswith("There is no folder 'outputs/laep' here, so the Hub was asked for it.\n")

    def test_a_mistyped_folder_beside_others_is_said_at_once(self, tmp_path, monkeypatch, capsys):
        """No user of the Hub is called as a folder here: nobody is asked, and nothing is loaded."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "outputs" / "leap").mkdir(parents=True)
        monkeypatch.setattr("hf_linear_attn.registration.register_all", lambda: pytest.fail("it began to work"))
        code, _, err = call(["explain", "outputs/laep", "some text"], capsys)
        assert code == 2
        assert "there is no folder 'outputs/laep'; 'outputs' has 'leap'" in err
        assert no_such_folder("outputs/leap") is no_such_folder("user/name") is no_such_folder("gpt2") is None
        for name in ("./x", "../x", "/x/y", "a/b/c", "user/name ", "x/", "a--b"):
            assert no_such_folder(name)

    def test_the_installed_command_sets_openmp_up_before_pytorch_is_loaded(self):
        """OMP_WAIT_POLICY is read once, when PyTorch is loaded, and any module of the package loads PyTorch."""
        pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        module, function = tomllib.loads(pyproject)["project"]["scripts"]["hf-linear-attn"].split(":")
        code = f"""if True:
            import importlib, os, sys, types
            start = getattr(importlib.import_module("{module}"), "{function}")
            assert "torch" not in sys.modules
            seen = lambda: print(os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
            for name in ("hf_linear_attn", "hf_linear_attn.cli", "hf_linear_attn.cli.main"):
                sys.modules[name] = types.SimpleNamespace(main=seen, __path__=[])
            start()"""
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        source = str(Path(__file__).parents[2] / "src")
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment | {"PYTHONPATH": source}
        )
        assert done.stdout == "PASSIVE False\n", done.stderr


class TestGenerate:
    """`generate --json`."""

    def test_result(self, leap, capsys):
        """The text is that of the model; the streamed words go to stderr."""
        found = result(["generate", leap, "w5 w9 w7", "--greedy", "--max-new-tokens", "4"], capsys)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(leap), AutoTokenizer.from_pretrained(leap)
        ids = tokenizer("w5 w9 w7", return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert found["text"] == tokenizer.decode(expected[0], skip_special_tokens=True)
        assert found["state_bytes"] == found["state_bytes_after_prompt"] > 0

    def test_positions_that_are_not_learned_have_no_limit(self, leap):
        """A DANet with cosine positions writes past `max_position_embeddings`; one with learned positions refuses."""
        tokenizer = AutoTokenizer.from_pretrained(leap)
        size = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 8}
        for positions in ("cosine", "learned"):
            config = DanetConfig(is_causal=True, position_embedding_type=positions, **size)
            model = DanetForCausalLM(config).eval()
            if positions == "learned":
                with pytest.raises(ValueError, match="exceed the model's 8 positions"):
                    write_text(model, tokenizer, "w5 w9 w7", max_new_tokens=9, greedy=True)
            else:
                assert write_text(model, tokenizer, "w5 w9 w7", max_new_tokens=9, greedy=True)["new_tokens"] > 0


class TestEvaluate:
    """`evaluate`."""

    def test_language_model(self, leap, text, capsys):
        """The loss is that of the logits over the same blocks; bits per byte follow from it."""
        found = result(["evaluate", leap, "--data", text, "--block-length", "40"], capsys)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(leap), AutoTokenizer.from_pretrained(leap)
        ids = torch.tensor([*tokenizer(TEXT).input_ids, tokenizer.eos_token_id])
        blocks = ids[: len(ids) // 40 * 40].view(-1, 40)
        with torch.no_grad():
            loss = model(blocks, labels=blocks).loss.item()
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) * len(ids) / len(TEXT), rel=1e-5)
        assert found["class"] == "LeapForCausalLM"

    def test_masked_words(self, text, tmp_path, capsys):
        """A fixed seed masks the same words; another one others."""
        folder = saved(BY_NAME["danet-encoder"].build("AutoModelForMaskedLM"), tmp_path / "masked")
        words = ["evaluate", folder, "--data", text, "--block-length", "40", "--seed"]
        first, again, other = (result([*words, seed], capsys) for seed in (0, 0, 1))
        assert first["loss"] == again["loss"] != other["loss"]
        assert 0 <= first["accuracy"] <= 1
        assert first["masked_tokens"] == pytest.approx(0.15 * 120, abs=15)

    def test_classes(self, tmp_path, capsys):
        """Accuracy of labels made by the model itself is 1; by name or number; a foreign label is refused."""
        model = ROWS["leap"].build("AutoModelForSequenceClassification", num_labels=3)
        model.config.id2label, model.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
        folder = saved(model, tmp_path / "classifier")
        texts = [" ".join(f"w{(7 * i + j) % 60 + 2}" for j in range(i + 3)) for i in range(9)]
        with torch.no_grad():
            ids = [word_tokenizer()(each, return_tensors="pt").input_ids for each in texts]
            labels = ["abc"[int(model(each).logits.argmax())] for each in ids]
        rows = [{"text": t, "label": x} for t, x in zip(texts, labels, strict=True)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found = result(["evaluate", folder, "--data", tmp_path / "rows.jsonl"], capsys)
        assert (found["accuracy"], found["rows"]) == (1.0, 9)
        (tmp_path / "wrong.csv").write_text("text,label\nw5,7\n")
        code, _, err = call(["evaluate", folder, "--data", tmp_path / "wrong.csv"], capsys)
        assert code == 1
        assert "outside 0 to 2" in err

    def test_other_heads_are_refused(self, tmp_path, capsys):
        """With the way out."""
        folder = saved(ROWS["leap"].build("AutoModel"), tmp_path / "body")
        code, _, err = call(["evaluate", folder], capsys)
        assert code == 1
        assert "LeapModel" in err
        assert "compute_metrics" in err


class TestConvert:
    """`convert`."""

    def test_a_pretrained_model_into_sea(self, tmp_path, capsys):
        """The host's weights are carried over, the options reach the configuration, the tokenizer comes along."""
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=64)
        host = saved(transformers.GPT2LMHeadModel(config), tmp_path / "host")
        words = ["convert", host, tmp_path / "sea", "--to", "sea", "--set", "k=4", "predictor_length=16"]
        found = result(words, capsys)
        assert found["class"] == "SeaForCausalLM"
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "sea")
        assert (model.config.k, model.config.predictor_length) == (4, 16)
        expected = transformers.GPT2LMHeadModel.from_pretrained(host).state_dict()
        weights = model.host_model.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
        assert AutoTokenizer.from_pretrained(tmp_path / "sea")("w5").input_ids == word_tokenizer()("w5").input_ids
        code, _, err = call(words, capsys)
        assert code == 2
        assert "--overwrite" in err

    def test_a_published_checkpoint(self, tmp_path, capsys):
        """A folder in the published names gives the published package's logits; without safetensors nothing is opened."""
        case = next(case for name, case in json.loads(GOLDEN.read_text())["cases"].items() if name.startswith("leap"))
        folder = tmp_path / "published"
        folder.mkdir()
        saved_with = {"model_type": "LeapForCausalLM", "torch_dtype": "float32", "transformers_version": "4.26.0"}
        (folder / "config.json").write_text(json.dumps(case["config"] | saved_with))
        (folder / "pytorch_model.bin").write_bytes(b"a pickle")
        code, _, err = call(["convert", folder, tmp_path / "out", "--to", "leap"], capsys)
        assert code == 1
        assert "never loaded" in err
        weights = {k: torch.tensor(v["data"]).view(v["shape"]).contiguous() for k, v in case["params"].items()}
        save_file(weights, folder / "model.safetensors")
        found = result(["convert", folder, tmp_path / "out", "--to", "leap"], capsys)
        assert found["class"] == "LeapForCausalLM"
        with torch.no_grad():
            logits = (
                AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(torch.tensor(case["input_ids"])).logits
            )
        torch.testing.assert_close(logits, torch.tensor(case["logits"]).view(logits.shape), atol=1e-4, rtol=1e-4)

    @pytest.mark.slow  # each export takes seconds: tests/integrations/test_export.py runs one
    def test_onnx(self, leap, tmp_path, capsys):
        """The step's file and its first state."""
        pytest.importorskip("onnxscript", reason="needs onnxscript: pip install hf-linear-attn[onnx]")
        found = result(["convert", leap, tmp_path / "onnx", "--to", "onnx"], capsys)
        assert {"step.onnx", "step.onnx.state.npz"} <= set(found["files"])


class TestBench:
    """`bench`."""

    def test_fresh_models(self, capsys):
        """Every model, length and job has a row; ours keeps the same bytes at both lengths, GPT-2 more at the longer."""
        words = [
            "bench",
            "--hidden-size",
            "16",
            "--num-hidden-layers",
            "1",
            "--num-attention-heads",
            "1",
            "--rounds",
            "1",
        ]
        found = result([*words, "--vocab-size", "300", "--lengths", "8", "16", "--new-tokens", "2"], capsys)
        rows = {(r["model"], r["length"], r["job"]): r for r in found["rows"]}
        assert len(rows) == 2 * 2 * 3
        assert all(row["tokens_per_second"] > 0 for row in rows.values())
        assert rows["leap", 8, "read"]["state_bytes"] == rows["leap", 16, "read"]["state_bytes"] > 0
        assert rows["gpt2", 16, "read"]["state_bytes"] == 2 * rows["gpt2", 8, "read"]["state_bytes"]

    def test_checkpoints(self, leap, capsys):
        """Saved models by their folders; a table for people."""
        words = ["bench", leap, "--lengths", "8", "--new-tokens", "2", "--rounds", "1", "--no-train"]
        code, out, _ = call(words, capsys)
        assert code == 0
        assert "tokens/s" in out
        assert {row["job"] for row in result(words, capsys)["rows"]} == {"read", "write"}

    def test_too_long(self, leap, capsys):
        """Learned positions bound the length."""
        code, _, err = call(["bench", leap, "--lengths", "300"], capsys)
        assert code == 1
        assert "256 positions" in err


class TestExplain:
    """`explain`."""

    @pytest.mark.parametrize("method", ["auto", "rollout"])
    def test_numbers_and_page(self, leap, method, tmp_path, capsys):
        """The scores are those of `importance`; the page holds the text."""
        found = result(["explain", leap, "w5 w9 w7", "--method", method, "--html", tmp_path / "page.html"], capsys)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(leap), AutoTokenizer.from_pretrained(leap)
        expected = importance(model, tokenizer, "w5 w9 w7", method=method)
        assert found["tokens"] == ["w5", "w9", "w7"]
        assert found["scores"] == pytest.approx(expected.scores.tolist(), abs=1e-5)
        assert [each["position"] for each in found["top"]] == expected.scores.argsort(descending=True).tolist()
        page = (tmp_path / "page.html").read_text()
        assert "w9" in page
        assert f"What {leap} (LeapForCausalLM) looks at" in page
        assert re.search(r" \d\.\d\d\+ ", page)  # the last colour stands for what is above, too

    def test_special_tokens_are_named_where_they_are_left_out(self, leap, capsys):
        """With what they have, or the list would not add up."""
        _, out, _ = call(["explain", leap, "w5 <eos> w7"], capsys)
        assert re.search(r"^\(without <eos>, which have \d+% of the sum\)$", out, flags=re.M)

    def test_words_for_people(self, leap, capsys):
        """The text and the list, without JSON."""
        code, out, _ = call(["explain", leap, "w5 w9 w7", "--top", "1"], capsys)
        assert code == 0
        assert "w5" in out
        assert re.search(r"^ +\d+\.\d\d  w[579]$", out, flags=re.M)


def rows(*values):
    """Lines of a .jsonl."""
    return "\n".join(map(json.dumps, values))


# name of a file -> its content, and what the error says of it; read as the text of a language model
BAD_TEXTS = {
    "empty.txt": ("", "is empty"),
    "latin.txt": ("w5 caf\u00e9".encode("latin-1"), "is not UTF-8 (byte 0xe9 at 6)"),
    "utf16.txt": ("w5 w6".encode("utf-16"), "is UTF-16"),
    "binary.txt": (b"\x89PNG\r\n\x1a\n\0\0", "no text"),
    "folder.txt": (None, "no files"),
    "picture.png": ("x", ".png"),
    "empty.csv": ("", "is empty"),
    "header.csv": ("text,label\n", "no rows"),
    "semicolons.csv": ("text;label\nw5;a\n", "Is ';' its separator"),
    "hole.csv": ("text,label\nw5,a\n,b\n", "row 2 has no text"),
    "numbers.csv": ("text,label\n5,a\n6,b\n", "row 1 has no text but int"),
    "ragged.csv": ("text,label\na,b\na,b,c,d\n", "line 3"),
    "blank.jsonl": ("\n\n", "no rows"),
    "null.jsonl": (rows({"text": "w5"}, {"text": None}), "row 2 has no text"),
    "number.jsonl": (rows({"text": 5}), "row 1 has no text but int"),
    "list.jsonl": (rows({"text": ["w5"]}), "row 1 has no text but list"),
    "mixed.jsonl": (rows({"text": "w5"}, {"text": 6}), "row 2 has no text but int"),
    "other.jsonl": (rows({"body": "w5"}), "lacks the column text_column='text'"),
    "broken.jsonl": (rows({"text": "w5"}) + '\n{"text": \n', "line 2 is no JSON"),
    "scalar.jsonl": ("1\n2\n", "line 1 is no JSON object"),
    "surrogate.jsonl": ('{"text": "w5 \\ud800"}\n', "line 1 holds half of a surrogate pair"),
    "cut.json": ('[{"text": "w5"}, {"te', "cannot be read as json"),
    "noise.parquet": (b"PAR1 and no more", "cannot be read as parquet"),
}
# the same, read as labelled rows
BAD_LABELS = {
    "list": (rows({"text": "w5", "label": ["a"]}), "row 1 has no word or number but list"),
    "null": (rows({"text": "w5", "label": "a"}, {"text": "w6", "label": None}), "row 2 has no label"),
    "nothing": (rows({"text": "w5"}), "lacks the column label_column='label'"),
    "text": (rows({"text": None, "label": "a"}), "row 1 has no text"),
    "unknown": (rows({"text": "w5", "label": "z"}), "label 'z' is outside 0 to 1"),
    "fraction": (rows({"text": "w5", "label": 0.5}), "label 0.5 is outside 0 to 1"),
}
REPORTS = {
    "truncated": '{"steps": 5, "te',
    "list": "[1, 2]",
    "number": "3",
    "null": "null",
    "missing": '{"steps": 5}',
    "types": '{"steps": "five", "training_tokens": "x", "training_seconds": null, "peak_memory_mb": []}',
    "curve": '{"curve": [1, 2]}',
    "lists": '{"log_history": [1, 2]}',
    "huge": '{"test": {"loss": 1' + "0" * 400 + "}}",
    "deep": "[" * 100_000,
    "binary": b"\xff\xfe\0\1",
    "empty": "",
}


@pytest.fixture(scope="module")
def one_leap(tmp_path_factory):
    """One saved model for all tests of bad input."""
    return saved(ROWS["leap"].causal_lm(), tmp_path_factory.mktemp("models") / "leap")


class TestBadInput:
    """What a user gets wrong ends in one message and exit code 1 or 2; what we get wrong shows its stack."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["train", "--epochs", "inf"], "epochs must be greater than 0 and at most"),
            (["train", "--epochs", "nan"], "epochs must be greater than 0"),
            (["train", "--windows", 10**20], "sizes from 1 to 2,147,483,647"),
            (["train", "--windows", "\u00b2"], "windows must list"),
            (["train", "--steps", 10**20], "steps must be at least 1 and at most 2,147,483,647"),
            (["train", "--vocab-size", 2**31 - 1], "vocab_size must be at least 259 and at most 1,048,576"),
            (["train", "--weight-decay", "nan"], "weight_decay must be at least 0 and finite, got nan"),
            (["train", "--weight-decay", "inf"], "weight_decay must be at least 0"),
            (["train", "--learning-rate", "inf"], "learning_rate must be greater than 0 and finite, got inf"),
            (["train", "--learning-rate", "-1"], "learning_rate must be greater than 0"),
            (["train", "--clip", "nan"], "clip must be greater than 0"),
            (["train", "--seed", "-1"], "seed must be at least 0"),
            (["train", "--threads", 10**9], "threads must be at least 1 and at most 1,024"),
            (["train", "--config", "initializer_range=NaN"], "NaN is no number"),
            (["train", "--output", ""], "--output is empty"),
            (["train", "--data", "a.txt", ""], "--data is empty"),
            (["distill", "--teacher", "a", "--task-weight", "nan"], "task_weight must be at least 0"),
            (["distill", "--teacher", "a", "--softmax-layers", "-1"], "softmax_layers must be at least 0"),
            (["distill", "--teacher", ""], "--teacher is empty"),
            (["convert", "a", "", "--to", "onnx"], "output is empty"),
            (["convert", "a", "b", "--to", "sea", "--set", "k=abc"], 'k must be int, got "abc"'),
            (["convert", "a", "b", "--to", "sea", "--set", "k=null"], "k must be int, got null"),
            (["convert", "a", "b", "--to", "sea", "--set", "kk=3"], "did you mean 'k'"),
            (["generate", "a", "text", "--temperature", "nan"], "--temperature must be at least 0.0001"),
            (["generate", "a", "text", "--seed", 2**80], "--seed must be at least 0 and at most 4,294,967,295"),
            (["generate", "a", "text \udcff"], "prompt holds bytes that are not UTF-8 text"),
            (["explain", "a", "text", "--html", ""], "--html is empty"),
            (["card", ""], "checkpoint is empty"),
            (["demo", "--output", ""], "--output is empty"),
            (["evaluate", "a", "--max-tokens", 10**30], "--max-tokens must be at least 1"),
        ],
        ids=lambda value: "-".join(ascii(word) for word in value[:1] + value[-2:]) if isinstance(value, list) else "",
    )
    def test_values(self, words, message, capsys):
        """Exit code 2: the option, its range and the value, before anything is loaded."""
        code, out, err = call(words, capsys)
        assert (code, out) == (2, "")
        assert err.startswith(f"hf-linear-attn {words[0]}: error: ")
        assert message in err

    @pytest.mark.parametrize(
        ("family", "field", "message"),
        [
            ("leap", "layer_norm_eps=1", None),
            ("leap", "num_hidden_layers=1e0", None),
            ("leap", "initializer_range=-1", "initializer_range"),
            ("leap", "use_cache=maybe", "use_cache must be bool"),
            ("leap", "hidden_size=null", "hidden_size must be int, got null"),
            ("leap", "vocab_size=5", "vocab_size=5 is less than"),
            ("fastformer", "max_position_embeddings=2", "less than block_length=8"),
            ("gpt2", "initializer_range=-1", "cannot be built"),
            ("gpt2", "activation_function=foo", "cannot be built"),
            ("gpt2", "layer_norm_epsilon=1", None),
        ],
    )
    def test_fields_of_a_configuration(self, family, field, message):
        """An integer is a float where one is wanted; what no model can be built of is a ValueError that names the field."""
        options = TrainingOptions(
            family=family, config=[field], block_length=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=1
        )
        if message is None:
            assert build_model(options, word_tokenizer()).num_parameters() > 0
        else:
            with pytest.raises(ValueError, match=message):
                build_model(options, word_tokenizer())

    @pytest.mark.parametrize("name", BAD_TEXTS)
    def test_texts(self, one_leap, name, tmp_path, capsys):
        """`evaluate` and `train` name the file and the place in it."""
        content, message = BAD_TEXTS[name]
        if content is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        calls = [["evaluate", one_leap], ["train", "--output", tmp_path / "out", "--cpu"]]
        for words in calls[: 2 if name.startswith(("null", "latin")) else 1]:
            code, out, err = call([*words, "--data", tmp_path / name], capsys)
            assert (code, out) == (1, "")
            assert err.splitlines()[-1].startswith(f"hf-linear-attn {words[0]}: error: ")
            assert message in err
        assert not (tmp_path / "out").exists()

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        """Editors of some systems put one in front."""
        (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfw5 w6")
        assert load_whole_files([str(tmp_path / "mark.txt")]).documents["train"]["text"][0] == "w5 w6"

    @pytest.mark.parametrize("name", BAD_LABELS)
    def test_labels(self, name, tmp_path, capsys):
        """Of a classifier's rows."""
        content, message = BAD_LABELS[name]
        (tmp_path / "rows.jsonl").write_text(content)
        model = saved(ROWS["leap"].build("AutoModelForSequenceClassification"), tmp_path / "classifier")
        code, _, err = call(["evaluate", model, "--data", tmp_path / "rows.jsonl"], capsys)
        assert code == 1
        assert message in err
        if name not in ("unknown", "fraction"):
            words = ["train", "--task", "classification", "--cpu", "--output", tmp_path / "out"]
            code, _, err = call([*words, "--data", tmp_path / "rows.jsonl"], capsys)
            assert code == 1
            assert message in err

    def test_labels_in_a_column_of_another_name(self, tmp_path, capsys):
        """As `train` takes them."""
        model = saved(ROWS["leap"].build("AutoModelForSequenceClassification"), tmp_path / "classifier")
        (tmp_path / "rows.csv").write_text("review,mood\nw5 w6,1\nw7,0\n")
        words = [
            "evaluate",
            model,
            "--data",
            tmp_path / "rows.csv",
            "--text-column",
            "review",
            "--label-column",
            "mood",
        ]
        assert result(words, capsys)["rows"] == 2

    @pytest.mark.parametrize("prompt", ["w5 " * 100, "/" * 300, "w5\n\t\u2603 ~ ..", "x" * 5000], ids=ascii)
    def test_any_text_is_a_prompt(self, prompt, monkeypatch, capsys):
        """Also one that is too long for the name of a folder."""
        seen = []
        monkeypatch.setattr("hf_linear_attn.cli.generate.load", lambda *_: (None, None))
        monkeypatch.setattr(
            "hf_linear_attn.cli.generate.write_text", lambda model, tokenizer, prompt, **_: seen.append(prompt) or {}
        )
        monkeypatch.setattr("hf_linear_attn.cli.generate.figures", lambda result: "")
        code, _, err = call(["generate", prompt], capsys)
        assert (code, seen) == (0, [prompt]), err

    def test_a_classifier_writes_no_text(self, tmp_path, capsys):
        """Its body alone would, without having learnt it."""
        folder = saved(ROWS["leap"].build("AutoModelForSequenceClassification"), tmp_path / "classifier")
        code, _, err = call(["generate", folder, "w5"], capsys)
        assert code == 1
        assert "holds a LeapForSequenceClassification, which writes no text" in err

    def test_names_what_was_looked_up(self, tmp_path, monkeypatch, capsys):
        """Not the first word of the call that happens to be no folder."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        words = ["train", "--batch-size", "16", "--data", "text.txt", "--tokenizer", "absent", "--cpu"]
        (tmp_path / "text.txt").write_text(TEXT)
        code, _, err = call(words, capsys)
        assert code == 1
        assert err.endswith("There is no folder 'absent' here, so the Hub was asked for it.\n")

    @pytest.mark.parametrize("kind", REPORTS)
    def test_a_broken_report_is_left_out_of_the_card(self, one_leap, kind, tmp_path, caplog, capsys):
        """And one line says so."""
        content = REPORTS[kind]
        for name in ("training_report.json", "distillation_report.json", "trainer_state.json"):
            folder = tmp_path / name.partition(".")[0]
            folder.mkdir()
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            caplog.clear()
            assert read_report(folder) == {}
            assert caplog.text.count(f"{folder / name} is left out of the card") == 1
        if kind == "types":
            (one_leap / "training_report.json").write_text(content)
            assert call(["card", one_leap, "--no-speed", "--output", tmp_path / "card.md"], capsys)[0] == 0
            (one_leap / "training_report.json").unlink()
            assert "Nothing is recorded" in (tmp_path / "card.md").read_text()

    def test_markup_of_a_report_is_text_in_the_card(self, one_leap, tmp_path):
        """HTML, Markdown and line ends of a report, and a folder whose name ends a string of Python."""
        folder = tmp_path / 'a"; import os; "`b'
        shutil.copytree(one_leap, folder)
        text = "<script>alert(1)</script> | x\n\n# head ![a](http://b) `c`"
        report = {"steps": 5, "training_tokens": 5, "training_seconds": 1.0, "peak_memory_mb": 1.0, "text": text}
        report |= {"options": {"precision": "<img src=x>"}, "test": {"<b>": 1.0, "loss": float("nan")}}
        (folder / "training_report.json").write_text(json.dumps(report))
        card = build_card(folder, speed=False)
        body = card.text
        assert not re.search(r"<(script|img|b)\b", body)
        assert "\n# head" not in body
        assert r"!\[a\]" in body
        assert [each.metric_type for each in card.data.eval_results] == ["<b>"]
        code = re.search(r"```python\n(.*?)```", body, flags=re.S)[1]
        strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert strings == [folder.name] * 2

    def test_control_characters_do_not_reach_the_terminal(self, one_leap, tmp_path, capsys):
        """Of texts, file names and error messages; our own colours stay."""
        evil = "w5 \x1b]0;title\x07w6 \x1b[2J \x9b31m\rw7"
        read = ReadText(evil, {}, [(0, len(evil))], [evil], torch.zeros(1, dtype=torch.bool))
        shown = to_terminal(read, torch.ones(1), "", 80, color=False)
        assert "\u241b]0;title\u2407" in shown
        shown += re.sub(r"\x1b\[(38;5;16;48;5;\d+|0)m", "", to_terminal(read, torch.ones(1), "", 80, color=True))
        shown += call(["explain", one_leap, evil], capsys)[1]
        model, tokenizer = AutoModelForCausalLM.from_pretrained(one_leap), AutoTokenizer.from_pretrained(one_leap)
        name = tmp_path / "e\x1b[31m.txt"
        name.write_text(TEXT)
        for words in (["--data", name, "--block-length", "40"], ["--data", f"{name}x"], ["--dta\x1b[31m"]):
            code, out, err = call(["evaluate", one_leap, *words], capsys)
            shown += out + (err if code else "").rpartition("\r")[2]  # before it, the progress bar's own
        write_text(model, tokenizer, evil, max_new_tokens=1)
        shown += capsys.readouterr().out
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)

    def test_json_has_no_nan(self, one_leap, text, monkeypatch, capsys):
        """A model that diverged: null, in JSON that every reader takes."""
        nothing = {"loss": float("nan"), "perplexity": math.inf, "more": [float("-inf"), 1.5]}
        monkeypatch.setattr(
            "hf_linear_attn.training.evaluation.evaluate_checkpoint", lambda **_: {"class": "a", "data": "b"} | nothing
        )
        code, out, _ = call(["evaluate", one_leap, "--data", text, "--json"], capsys)
        assert code == 0
        found = json.loads(out, parse_constant=lambda word: pytest.fail(word))
        assert (found["loss"], found["perplexity"], found["more"]) == (None, None, [None, 1.5])

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (OSError(errno.ENOSPC, "No space left on device", "out/x"), "'out/x': No space left on device"),
            (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 268864 vs 268752"), "disk full"),
            (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left"),
            (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
            (EOFError("Compressed file ended"), "cut short"),
            (TypeError("ours"), None),
            (RuntimeError("ours"), None),
            (AssertionError("ours"), None),
            (KeyError("ours"), None),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
    )
    def test_which_errors_are_a_users(self, error, message, monkeypatch, capsys):
        """The others pass with their stack, after what libraries had said."""

        def fail(words):
            quiet_libraries()
            transformers.utils.logging.get_logger("transformers.trainer").warning("see above")
            raise error

        monkeypatch.setattr("hf_linear_attn.cli.card.run", fail)
        if message is None:
            with pytest.raises(type(error), match="ours"):
                main(["card", "a"])
            assert "see above" in capsys.readouterr().err
        else:
            code, _, err = call(["card", "a"], capsys)
            assert code == 1
            assert message in err
            assert err.count("\n") == 1

    def test_closed_pipe(self, monkeypatch, capsys):
        """`| head`: no message, the code of a program that SIGPIPE ends."""
        read, write = os.pipe()
        os.close(read)
        monkeypatch.setattr("hf_linear_attn.cli.card.run", lambda words: print("x" * 10**6) or 0)
        with os.fdopen(write, "w") as stream:
            monkeypatch.setattr("sys.stdout", stream)
            assert main(["card", "a"]) == 141
        assert capsys.readouterr().err == ""


DAMAGES = {kind: kind for kind in ("nothing fits", "one is missing", "renamed", "shape", "one too many")}


class TestMissingWeights:
    """Tensors that are missing, unexpected or of another shape: an error that names them, for every command."""

    @staticmethod
    def damage(folder, kind):
        """Change the weights in place; returns the tensor that is wrong."""
        weights = load_file(folder / "model.safetensors")
        name = sorted(weights)[len(weights) // 2]
        tensor = weights.pop(name)
        changed = {
            "nothing fits": {"junk": torch.zeros(2)},
            "one is missing": weights,
            "renamed": weights | {name + "x": tensor},
            "shape": weights | {name: torch.zeros(3, *tensor.shape)},
            "one too many": weights | {name: tensor, "layers.9.junk": torch.zeros(2)},
        }[kind]
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        return "layers.9.junk" if kind == "one too many" else name

    @rows_and("kind", DAMAGES, FAMILY_ROWS, lambda row, kind: row.name == "leap" or kind == "one is missing")
    def test_every_kind(self, row, kind, text, tmp_path, capsys):
        """Exit code 1, the file and the tensor."""
        folder = saved(row.causal_lm(), tmp_path / "model")
        name = self.damage(folder, kind)
        code, out, err = call(["evaluate", folder, "--data", text, "--block-length", "40", "--json"], capsys)
        assert (code, out) == (1, "")
        assert str(folder / "model.safetensors") in err
        assert name in err or kind == "nothing fits"

    @pytest.mark.parametrize("command", ["generate", "explain", "card", "bench", "sea", "onnx", "train", "distill"])
    def test_every_command(self, command, text, tmp_path, capsys):
        """One tensor less; no output is left."""
        host = command in ("sea", "distill")
        size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)) if host else ROWS["leap"].causal_lm()
        folder, out = saved(model, tmp_path / "model"), tmp_path / "out"
        name = self.damage(folder, "one is missing")
        words = {
            "generate": ["generate", folder, "w5"],
            "explain": ["explain", folder, "w5"],
            "card": ["card", folder, "--output", out],
            "bench": ["bench", folder, "--lengths", "4"],
            "sea": ["convert", folder, out, "--to", "sea"],
            "onnx": ["convert", folder, out, "--to", "onnx"],
            "train": ["train", "--from-checkpoint", folder, "--data", text, "--block-length", "8", "--output", out],
            "distill": ["distill", "--teacher", folder, "--data", text, "--block-length", "16", "--output", out],
        }[command]
        code, _, err = call(words, capsys)
        assert code == 1
        assert name in err

    @every_head
    def test_no_false_alarm(self, row, head, tmp_path, caplog):
        """Every head of every family as it was saved: tied weights, heads without weights, buffers."""
        row.build(head).save_pretrained(tmp_path)
        assert load_model(getattr(transformers, head), tmp_path) is not None
        assert "random weights" not in caplog.text

    def test_heads_of_a_pretrained_host(self, tmp_path, caplog):
        """A BERT of the Hub: saved as masked language model, with the pooler and the second head of its pretraining."""
        size = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 64,
        }
        transformers.BertForPreTraining(transformers.BertConfig(**size)).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        load_model(transformers.AutoModelForMaskedLM, tmp_path)
        load_model(transformers.AutoModelForPreTraining, tmp_path)
        assert "random weights" not in caplog.text
        with pytest.raises(ValueError, match=r"missing classifier\.bias, classifier\.weight.*saved as BertForMaskedLM"):
            load_model(transformers.AutoModelForSequenceClassification, tmp_path)
        load_model(transformers.AutoModelForSequenceClassification, tmp_path, new_head=True)
        assert "new, with random weights: classifier.bias, classifier.weight" in caplog.text

    def test_a_new_head_does_not_excuse_the_body(self, tmp_path):
        """Fine-tuning from a body whose weights are incomplete."""
        ROWS["leap"].build("AutoModel").save_pretrained(tmp_path)
        name = self.damage(tmp_path, "one is missing")
        with pytest.raises(ValueError, match=re.escape(name)):
            load_model(transformers.AutoModelForSequenceClassification, tmp_path, new_head=True)

    def test_other_classes_take_a_new_head(self, tmp_path, caplog):
        """A classifier of three classes is fine-tuned on five."""
        ROWS["leap"].build("AutoModelForSequenceClassification", num_labels=3).save_pretrained(tmp_path)
        auto = transformers.AutoModelForSequenceClassification
        assert load_model(auto, tmp_path, new_head=True, num_labels=5).num_labels == 5
        assert "new, with random weights: score.weight" in caplog.text
        with pytest.raises(ValueError, match=r"of another shape score\.weight \(3, 16\) instead of \(5, 16\)"):
            load_model(auto, tmp_path, num_labels=5)

    def test_adapters(self, tmp_path):
        """Of PEFT: loaded with their base model, whose weights are looked at, too."""
        peft = pytest.importorskip("peft")
        base = saved(ROWS["leap"].causal_lm(), tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(base)
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
        loaded = load_model(transformers.AutoModelForCausalLM, tmp_path / "adapter")
        assert any("lora" in name for name, _ in loaded.named_parameters())
        name = self.damage(base, "one is missing")
        with pytest.raises(ValueError, match=re.escape(name)):
            load_model(transformers.AutoModelForCausalLM, tmp_path / "adapter")
