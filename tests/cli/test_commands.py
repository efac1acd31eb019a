"""Every command of `hf-linear-attn`: help with an example, `--json`, suggestions, exit codes, and results that are true."""

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from common.families import ROWS as VARIANTS
from common.tiny import FAMILY_ROWS, word_tokenizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_linear_attn import DanetConfig, DanetForCausalLM
from hf_linear_attn.cli.generate import write_text
from hf_linear_attn.cli.main import COMMANDS, main
from hf_linear_attn.explain import importance

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
    tokenizer.mask_token = "w3"
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
        """Exit code 1 and one message that names it, no stack; no half-made output."""
        monkeypatch.chdir(tmp_path)
        code, _, err = call(words, capsys)
        assert code == 1
        assert "absent" in err
        assert "Traceback" not in err
        assert not (tmp_path / "out").exists()

    def test_a_mistyped_folder_that_could_be_a_name_on_the_hub(self, tmp_path, monkeypatch, capsys):
        """Transformers' own message names neither the folder nor what is wrong with it when the Hub cannot be reached."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        code, _, err = call(["explain", "outputs/laep", "some text"], capsys)
        assert code == 1
        assert err.endswith("There is no folder 'outputs/laep' here, so the Hub was asked for it.\n")

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
        assert "w9" in (tmp_path / "page.html").read_text()

    def test_words_for_people(self, leap, capsys):
        """The text and the list, without JSON."""
        code, out, _ = call(["explain", leap, "w5 w9 w7", "--top", "1"], capsys)
        assert code == 0
        assert "w5" in out
        assert re.search(r"^ +\d+\.\d\d  w[579]$", out, flags=re.M)
