"""Training runs: what they save, the batches they see, and that an interrupted one continues with the same losses."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets", reason="the extra `train` is not installed")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils.generic import find_labels

from hf_linear_attn.cli import demo
from hf_linear_attn.cli import main as cli
from hf_linear_attn.training import language_modeling
from hf_linear_attn.training.checkpoints import StopOnSignal, last_complete_checkpoint
from hf_linear_attn.training.language_modeling import TrainingInterrupted, train_language_model
from hf_linear_attn.training.measuring import perplexity
from hf_linear_attn.training.options import TrainingOptions

pytestmark = pytest.mark.long


def losses(report):
    return {kind: [(p["step"], p["loss"]) for p in points] for kind, points in report["curve"].items()}


@pytest.mark.usefixtures("draws")
def test_a_run_learns_saves_and_reports(tiny):
    report = train_language_model(tiny(steps=30, learning_rate=1e-2, eval_every=15, save_every=15))
    folder = Path(report["options"]["output"])
    training = [loss for _, loss in losses(report)["training"]]
    assert training[-1] < training[0] - 0.5
    assert report["test"]["perplexity"] == pytest.approx(math.exp(report["test"]["loss"]))
    assert 0 < report["test"]["bits_per_byte"] < 8
    assert report["tokens_per_second"] > 0
    assert report["peak_memory_mb"] > 0
    assert report["training_tokens"] == 30 * 4 * 16
    for name in ("training_report.json", "learning_curve.json", "learning_curve.png", "training_options.json"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "training_report.json").read_text())["steps"] == 30

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.use_cache
    ids = model.generate(**tokenizer(["The people", "We"], return_tensors="pt", padding=True), max_new_tokens=5)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).startswith("The people")


def test_final_perplexity_is_that_of_the_saved_model(tiny):
    options = tiny(final_eval_tokens=None)
    report = train_language_model(options)
    _, text = language_modeling.prepare_text(language_modeling.load_text(options), options.vocab_size)
    blocks = language_modeling.TokenBlocks(text.ids["test"], options.block_length)
    batch = torch.stack([blocks[i]["input_ids"] for i in range(len(blocks))])
    model = AutoModelForCausalLM.from_pretrained(options.output).eval()
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    assert report["test"]["loss"] == pytest.approx(loss, abs=1e-4)


def test_two_families_see_the_same_batches(tiny, monkeypatch, tmp_path):
    seen = []
    original = language_modeling.stack_blocks

    def record(rows):
        batch = original(rows)
        seen[-1].append(batch["input_ids"])
        return batch

    monkeypatch.setattr(language_modeling, "stack_blocks", record)
    for name, changes in (("a", {}), ("b", {"hidden_size": 8, "num_hidden_layers": 1, "dropout": 0.1})):
        seen.append([])
        train_language_model(tiny(output=str(tmp_path / name), **changes))
    assert len(seen[0]) == len(seen[1]) > 6
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not torch.equal(seen[0][0], seen[0][1])


class StopAfter(TrainerCallback):
    """Sends the process a signal during a step, as Ctrl-C does."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_continues_with_the_same_losses(tiny, tmp_path, monkeypatch, capsys, number):
    changes = {"dropout": 0.2, "steps": 10, "accumulate": 2}  # dropout: the random state must come back, too
    whole = train_language_model(tiny(output=str(tmp_path / "whole"), **changes))

    output = str(tmp_path / "parts")
    original = language_modeling.Trainer

    def interrupted(*args, callbacks, **kwargs):
        return original(*args, callbacks=[*callbacks, StopAfter(4, number)], **kwargs)

    monkeypatch.setattr(language_modeling, "Trainer", interrupted)
    with pytest.raises(TrainingInterrupted, match="stopped after step 5") as stopped:
        train_language_model(tiny(output=output, **changes))
    assert stopped.value.signal_number == number
    monkeypatch.setattr(language_modeling, "Trainer", original)
    capsys.readouterr()
    resumed = train_language_model(TrainingOptions.for_resume({"output": output}))
    printed = capsys.readouterr().out
    assert "step     6/10  training loss" in printed
    assert "step     5/10" not in printed, "the run began again instead of going on"
    assert losses(resumed) == losses(whole)
    assert resumed["test"] == whole["test"]


def test_killed_process_resumes_from_its_last_complete_checkpoint(tiny, tmp_path, capsys):
    """A kill -9 in the middle of a run, a half-written checkpoint on top: the curve is that of the undisturbed run."""
    options = tiny(output=str(tmp_path / "killed"), steps=30, save_every=5, eval_every=15)
    code = (
        "import json, sys; from hf_linear_attn.training.options import TrainingOptions as T;"
        "from hf_linear_attn.training.language_modeling import train_language_model as t;"
        "t(T(**json.loads(sys.argv[1])))"
    )
    arguments = json.dumps({name: getattr(options, name) for name in options.__dataclass_fields__})
    process = subprocess.Popen([sys.executable, "-c", code, arguments], stdout=subprocess.DEVNULL)
    folder, deadline = Path(options.output), time.monotonic() + 120
    while last_complete_checkpoint(folder) is None:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    reached = int(last_complete_checkpoint(folder).name.split("-")[1])
    assert reached < 30
    half_written = folder / f"checkpoint-{reached + 5}"
    half_written.mkdir(exist_ok=True)
    (half_written / "trainer_state.json").write_text('{"global_step": ')

    resumed = train_language_model(TrainingOptions.for_resume({"output": options.output}))
    assert f"step {reached:>5}/30" not in capsys.readouterr().out, "the run began again instead of going on"
    whole = train_language_model(tiny(output=str(tmp_path / "whole"), steps=30, save_every=5, eval_every=15))
    assert losses(resumed) == losses(whole)


def test_resume_refuses_what_would_bend_the_curve(tiny, tmp_path):
    options = tiny()
    train_language_model(options)
    with pytest.raises(ValueError, match=r"learning_rate=0\.003.*learning_rate=0\.5"):
        TrainingOptions.for_resume({"output": options.output, "learning_rate": 0.5})
    assert TrainingOptions.for_resume({"output": options.output, "quiet": True}).hidden_size == 16
    with pytest.raises(ValueError, match="no run to resume"):
        TrainingOptions.for_resume({"output": str(tmp_path / "empty")})


def test_an_earlier_run_is_not_overwritten_unasked(tiny):
    train_language_model(tiny())
    with pytest.raises(ValueError, match="holds an earlier run"):
        train_language_model(tiny())
    folder = Path(tiny().output)
    (folder / "notes.txt").write_text("mine")
    assert train_language_model(tiny(overwrite=True, steps=2))["steps"] == 2
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (folder / "notes.txt").exists()


def test_a_run_that_cannot_start_leaves_no_trace(tiny):
    with pytest.raises(ValueError, match="does not exist"):
        train_language_model(tiny(data=["absent.txt"]))
    assert not Path(tiny().output).exists()


def test_resume_before_the_first_checkpoint_starts_at_the_beginning(tiny, capsys):
    options = tiny()
    Path(options.output).mkdir()
    options.save(Path(options.output))
    report = train_language_model(TrainingOptions.for_resume({"output": options.output}))
    assert report["steps"] == 6
    assert "starting from the first step" in capsys.readouterr().out


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a shell that starts a test run in the background makes it ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_second_signal_stops_at_once():
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_options_that_a_family_lacks_are_refused(tiny):
    with pytest.raises(ValueError, match="windows and all_global belong to leap"):
        train_language_model(tiny(all_global=True))
    with pytest.raises(ValueError, match="did you mean 'initializer_range'"):
        train_language_model(tiny(config=["initialiser_range=0.1"], overwrite=True))


@pytest.mark.parametrize(
    "changes", [{"precision": "bfloat16"}, {"gradient_checkpointing": True}, {"schedule": "cosine"}, {"epochs": 0.2}]
)
def test_other_ways_to_train(tiny, changes):
    if "epochs" in changes:
        changes = {**changes, "steps": None}
    report = train_language_model(tiny(**changes))
    assert report["steps"] > 1
    assert math.isfinite(report["test"]["loss"])


@pytest.mark.parametrize(("family", "ends"), [("leap", False), ("fastformer", True)], ids=["leap", "fastformer"])
def test_our_families_train_resume_and_write(tiny, tmp_path, family, ends, capsys):
    """A text may be longer than the blocks that a model was trained on, except where positions are learned."""
    changes = {"family": family, "hidden_size": 32, "num_attention_heads": 1, "dropout": 0.1, "block_length": 40}
    output = str(tmp_path / "leap")
    report = train_language_model(tiny(output=output, **changes))
    assert math.isfinite(report["test"]["loss"])
    assert cli.main(["generate", output, "The people", "--max-new-tokens", "12"]) == 0
    written = capsys.readouterr().out
    assert "The people" in written
    assert "12 tokens" in written
    after_prompt, at_end = re.search(
        r"state ([\d.]+) KiB after the prompt .*, ([\d.]+) KiB at the end", written
    ).groups()
    assert after_prompt == at_end
    code = cli.main(
        ["generate", output, "The people", "--max-new-tokens", "100"]
    )  # the blocks it was trained on have 40
    written = capsys.readouterr()
    assert (code == 1 and "positions" in written.err) if ends else (code == 0 and "100 tokens" in written.out)


def test_windows_reach_the_model(tiny, tmp_path):
    small = {"family": "leap", "hidden_size": 32, "num_attention_heads": 1, "steps": 1}
    train_language_model(tiny(windows="3,global", output=str(tmp_path / "a"), **small))
    train_language_model(tiny(all_global=True, output=str(tmp_path / "b"), config=["focus_function=exp"], **small))
    configs = [AutoModelForCausalLM.from_pretrained(tmp_path / name).config for name in "ab"]
    assert [config.layer_windows for config in configs] == [[3, None], [None, None]]
    assert configs[1].focus_function == "exp"


def test_causal_danet_learns_and_comes_back(tiny, tmp_path):
    """`train --family danet --causal`: a decoder scaled for its block length, which AutoModelForCausalLM loads; and it learns."""
    small = {"hidden_size": 32, "num_hidden_layers": 3, "learning_rate": 1e-2, "steps": 30, "eval_every": 15}
    report = train_language_model(tiny(family="danet", causal=True, config=["window_size=8"], **small))
    losses = [point["loss"] for point in report["curve"]["training"]]
    assert losses[-1] < losses[0] - 1
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert (config.is_causal, config.scale_length, config.window_size) == (True, 16, 8)
    with pytest.raises(ValueError, match="give causal"):
        train_language_model(tiny(family="danet", output=str(tmp_path / "encoder")))


@pytest.mark.usefixtures("draws")
def test_demo_compares_three_models_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_as_process", cli.main)  # spares the time of two starts
    threads, output = torch.get_num_threads(), tmp_path / "demo"
    words = ["demo", "--steps", "2", "--threads", "1", "--output", str(output), "--tiny"]
    assert cli.main(words) == 0
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for expected in (
        "validation loss",
        "leap ",
        "gpt2 ",
        "bits/byte",
        "KiB at the end",
        "hf-linear-attn train --family gpt2",
        "danet ",
        "hf-linear-attn train --family danet --causal",
    ):
        assert expected in printed
    assert (output / "learning_curve.png").stat().st_size > 5000
    reports = json.loads((output / "comparison.json").read_text())
    assert len({report["training_tokens"] for report in reports.values()}) == 1
    assert set(json.loads((output / "learning_curve.json").read_text())) == {"leap", "danet", "gpt2"}


@pytest.mark.parametrize("family", ["leap", "fastformer", "danet"])
def test_trainer_expects_labels_and_nothing_else(family):
    """Trainer reads label names off the signature of forward, and evaluates without a loss where a batch lacks one of them."""
    config = AutoConfig.for_model(family)
    assert find_labels(AutoModelForCausalLM._model_mapping[type(config)]) == ["labels"]


def test_the_perplexity_of_a_diverged_run_is_infinite():
    """Math.exp raises OverflowError beyond 709, which would lose a whole run's report."""
    assert perplexity(2.0) == pytest.approx(7.389, abs=1e-3)
    assert perplexity(800.0) == float("inf")
    assert perplexity(float("nan")) != perplexity(float("nan"))
