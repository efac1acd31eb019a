"""A resumed run is the run that was interrupted, and nothing is removed before what replaces it can be used."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="the extra `train` is not installed")

from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_linear_attn.cli import card, convert, demo, evaluate, explain, generate
from hf_linear_attn.cli import main as cli
from hf_linear_attn.training import classification, language_modeling, run_folder
from hf_linear_attn.training.checkpoints import StopOnSignal
from hf_linear_attn.training.classification import train_classifier
from hf_linear_attn.training.distill_options import DistillOptions
from hf_linear_attn.training.language_modeling import TrainingInterrupted, train_language_model
from hf_linear_attn.training.options import OPTIONS_FILE, TrainingOptions
from hf_linear_attn.training.run_folder import RunFolder


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does: nothing that catches errors sees it."""


class EndAt(TrainerCallback):
    """Kills the run before it takes the step after `step`, or signals it to stop after that step."""

    def __init__(self, step, stop=None):
        self.step, self.stop = step, stop

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        if self.stop is None:
            raise Killed
        self.stop.received = 15


TRAINERS = ((language_modeling, "Trainer"), (language_modeling, "MaskedWordsTrainer"), (classification, "Trainer"))


@pytest.fixture
def ending(monkeypatch):
    """Make runs end after a step: by a kill, or by a signal."""
    trainers = [(module, name, getattr(module, name)) for module, name in TRAINERS]

    def end(step, by_signal=False):
        def ended(trainer_class):
            def interrupted(*args, callbacks, **kwargs):
                stop = next(each for each in callbacks if isinstance(each, StopOnSignal))
                return trainer_class(*args, callbacks=[*callbacks, EndAt(step, stop if by_signal else None)], **kwargs)

            return interrupted

        for module, name, trainer_class in trainers:
            monkeypatch.setattr(module, name, ended(trainer_class))

    def not_any_more():
        for module, name, trainer_class in trainers:
            monkeypatch.setattr(module, name, trainer_class)

    end.not_any_more = not_any_more
    return end


def labelled(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"{'peace' if i % 2 else 'war'} and message {i}", "label": i % 2} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return {"task": "classification", "family": "bert", "data": [str(file)]}


KINDS = {
    "leap": {"family": "leap", "num_attention_heads": 1, "accumulate": 2},
    "fastformer": {"family": "fastformer", "num_attention_heads": 1},
    "danet": {"family": "danet", "causal": True, "num_attention_heads": 1},
    "mlm": {"task": "mlm", "family": "danet", "num_attention_heads": 1, "config": ["window_size=4"]},
    "classification": {},
}


def trained(kind, tiny, tmp_path, **changes):
    own = labelled(tmp_path) if kind == "classification" else KINDS[kind]
    return tiny(**{"dropout": 0.2, **own, **changes})


def train(options):
    return (train_classifier if options.task == "classification" else train_language_model)(options)


def resume(folder, **more):
    return train(TrainingOptions.for_resume({"output": str(folder), **more}))


def bytes_of(folder, names=("model.safetensors", "config.json")):
    return {name: (folder / name).read_bytes() for name in names}


# Of the causal families one in every run: they share the trainer, and what a checkpoint holds of a model is its weights.
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("fastformer", "danet"))) for kind in KINDS]
)
def test_the_curve_is_the_same_for_every_interval_of_points_and_checkpoints(kind, tiny, tmp_path, ending):
    """Killed between two points, then signalled between the next two: means over 4 steps, as if nothing had happened."""
    changes = {"steps": 13, "log_every": 4, "save_every": 3, "eval_every": 5}
    whole = train(trained(kind, tiny, tmp_path, output=str(tmp_path / "whole"), **changes))
    assert [point["step"] for point in whole["curve"]["training"]] == [1, 4, 8, 12]
    parts = tmp_path / "parts"
    ending(7)
    with pytest.raises(Killed):
        train(trained(kind, tiny, tmp_path, output=str(parts), **changes))
    ending(8, by_signal=True)
    with pytest.raises(TrainingInterrupted, match="stopped after step 9"):
        resume(parts)
    ending.not_any_more()
    resumed = resume(parts)
    assert resumed["curve"] == whole["curve"]
    assert [resumed[split] for split in ("validation", "test", "steps")] == [
        whole[split] for split in ("validation", "test", "steps")
    ]
    assert bytes_of(parts) == bytes_of(tmp_path / "whole")
    carried = json.loads((parts / "checkpoint-13" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert carried["Throughput"]["attributes"]["steps"] == 13 - 3  # without the first step of each of three sessions
    assert carried["RunFolder"]["attributes"]["seconds"] > carried["Throughput"]["attributes"]["seconds"] > 0


@pytest.mark.parametrize("kind", ["leap", "classification"])
def test_a_run_whose_steps_are_done_trains_nothing_more(kind, tiny, tmp_path, capsys):
    changes = {"schedule": "constant", "steps": None, "epochs": 0.1} if kind == "leap" else {"steps": 3}
    folder = tmp_path / "run"
    whole = train(trained(kind, tiny, tmp_path, output=str(folder), **changes))
    saved, state = bytes_of(folder), sorted(folder.iterdir())
    capsys.readouterr()
    assert resume(folder) == json.loads((folder / "training_report.json").read_text())
    assert "is finished after" in capsys.readouterr().out
    assert (bytes_of(folder), sorted(folder.iterdir())) == (saved, state)

    # Killed in the final evaluation: nothing of the result is there yet.
    for name in ("training_report.json", "learning_curve.json", *saved):
        (folder / name).unlink()
    again = resume(folder)
    assert "nothing is left to train" in capsys.readouterr().out
    assert bytes_of(folder) == saved
    for name in ("steps", "curve", "validation", "test"):
        assert again[name] == whole[name]

    # Other options of the final evaluation are honoured, and a broken report is written anew.
    (folder / "training_report.json").write_text("{")
    assert resume(folder)["steps"] == whole["steps"]
    if kind == "leap":
        assert resume(folder, final_eval_tokens=32)["test"] != whole["test"]
    assert bytes_of(folder) == saved


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run of four steps with two checkpoints, made once."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "text.txt").write_text("The people of this country ask for peace and for work. " * 150)
    return folder


@pytest.fixture
def two_checkpoints(stopped_run, tiny, tmp_path):
    options = tiny(data=[str(stopped_run / "text.txt")], output=str(stopped_run / "run"), steps=4, save_every=2)
    if not (stopped_run / "run").exists():
        train_language_model(options)
    shutil.copytree(stopped_run / "run", tmp_path / "run")
    (tmp_path / "run" / "training_report.json").unlink()
    return tmp_path / "run"


FILES = (
    "model.safetensors",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


def spoil(file, how):
    whole = file.read_bytes()
    {
        "missing": file.unlink,
        "empty": lambda: file.write_bytes(b""),
        "truncated": lambda: file.write_bytes(whole[: len(whole) // 2]),
        "short": lambda: file.write_bytes(whole[:-3]),
        "garbage": lambda: file.write_bytes(b"\x93x{" * (len(whole) // 3)),
        "flipped": lambda: file.write_bytes(whole[: len(whole) // 2] + b"\xff\x00\xa5" + whole[len(whole) // 2 + 3 :]),
    }[how]()


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in FILES for how in ("missing", "empty", "truncated", "garbage")]
    + [("optimizer.pt", "flipped"), ("model.safetensors", "short"), ("trainer_state.json", "short")],
)
def test_an_incomplete_checkpoint_is_named_and_passed_over(two_checkpoints, name, how, capsys):
    spoil(two_checkpoints / "checkpoint-4" / name, how)
    run = RunFolder(TrainingOptions.for_resume({"output": str(two_checkpoints)}), "training_report.json")
    printed = capsys.readouterr().out
    assert run.checkpoint == two_checkpoints / "checkpoint-2"
    assert len(printed.splitlines()) == 1
    assert f"checkpoint-4 is incomplete ({name} is " in printed


def test_after_stepping_back_the_run_is_the_same(two_checkpoints, stopped_run, capsys):
    """Also with one checkpoint kept: the damaged one must not push out the ones that are written."""
    (two_checkpoints / "checkpoint-4" / "optimizer.pt").unlink()
    words = [
        "train",
        "--resume",
        "--quiet",
        "--output",
        str(two_checkpoints),
        "--keep-checkpoints",
        "1",
        "--save-every",
        "1",
    ]
    assert cli.main(words) == 0
    assert "step     3/4" in capsys.readouterr().out
    assert bytes_of(two_checkpoints) == bytes_of(stopped_run / "run")
    assert [path.name for path in two_checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    assert (two_checkpoints / "checkpoint-4" / "optimizer.pt").exists()


def test_without_a_whole_checkpoint_resuming_says_what_to_do(two_checkpoints, capsys):
    (two_checkpoints / "checkpoint-4" / "optimizer.pt").unlink()
    (two_checkpoints / "checkpoint-2" / "rng_state.pth").write_bytes(b"")
    assert cli.main(["train", "--resume", "--quiet", "--output", str(two_checkpoints)]) == 1
    told = capsys.readouterr().err.strip()
    assert len(told.splitlines()) == 1
    for words in ("checkpoint-4: optimizer.pt is missing", "checkpoint-2: rng_state.pth is empty", "overwrite"):
        assert words in told


def test_a_checkpoint_of_the_first_version_is_gone_on_from(two_checkpoints, stopped_run):
    """It has none of the entries that the callbacks add, and its options have no mark of the run."""
    shutil.rmtree(two_checkpoints / "checkpoint-4")
    file = two_checkpoints / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    file.write_text(
        json.dumps(state | {"stateful_callbacks": {"TrainerControl": state["stateful_callbacks"]["TrainerControl"]}})
    )
    options = json.loads((two_checkpoints / OPTIONS_FILE).read_text())
    options.pop("run_id")
    (two_checkpoints / OPTIONS_FILE).write_text(json.dumps(options))
    resume(two_checkpoints)
    assert bytes_of(two_checkpoints) == bytes_of(stopped_run / "run")


@pytest.mark.parametrize("method", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_kill_while_a_checkpoint_is_saved_leaves_nothing_that_looks_whole(tiny, tmp_path, monkeypatch, method):
    whole = train_language_model(tiny(output=str(tmp_path / "whole"), log_every=4))
    folder, original = tmp_path / "run", getattr(Trainer, method)

    def killed(self, output_dir=None, *args, **kwargs):
        original(self, output_dir, *args, **kwargs)
        if self.state.global_step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, method, killed)
        with pytest.raises(Killed):
            train_language_model(tiny(output=str(folder), log_every=4))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert resume(folder)["curve"] == whole["curve"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def kill_in(patch, owner, name, after=False):
    original = getattr(owner, name)

    def killed(*args, **kwargs):
        if after:
            original(*args, **kwargs)
        raise Killed

    patch.setattr(owner, name, killed)


@pytest.mark.parametrize(
    ("name", "after", "remains"),
    [
        ("on_train_begin", True, "earlier"),
        ("_claim", False, "earlier"),
        ("_claim", True, "new"),
        ("_remove_earlier", True, "new"),
        ("_publish", False, "new"),
        ("_publish", True, "new"),
    ],
)
def test_overwriting_leaves_one_of_both_runs_at_every_moment(
    two_checkpoints, stopped_run, tiny, monkeypatch, name, after, remains
):
    new = tiny(
        data=[str(stopped_run / "text.txt")], output=str(two_checkpoints), steps=4, save_every=2, seed=1, overwrite=True
    )
    (two_checkpoints / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        kill_in(patch, RunFolder, name, after)
        with pytest.raises(Killed):
            train_language_model(new)
    resumed = RunFolder(TrainingOptions.for_resume({"output": str(two_checkpoints)}), "training_report.json")
    assert resumed.checkpoint.name == ("checkpoint-4" if remains == "earlier" else "checkpoint-2")
    report = resume(two_checkpoints)
    assert report["options"]["seed"] == (0 if remains == "earlier" else 1)
    assert report["steps"] == 4
    assert (bytes_of(two_checkpoints) == bytes_of(stopped_run / "run")) == (remains == "earlier")
    assert (two_checkpoints / "notes.txt").read_text() == "mine"
    assert not (two_checkpoints / run_folder.UNFINISHED).exists()


def test_a_run_that_fails_before_its_first_checkpoint_gives_the_folder_back(tiny, tmp_path, monkeypatch):
    def fails(self, *args, **kwargs):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            train_language_model(tiny())
        assert not (tmp_path / "run").exists()
    train_language_model(tiny(steps=2))
    saved = bytes_of(tmp_path / "run", ("model.safetensors", OPTIONS_FILE, "checkpoint-2/optimizer.pt"))
    monkeypatch.setattr(Trainer, "training_step", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        train_language_model(tiny(overwrite=True))
    assert bytes_of(tmp_path / "run", saved) == saved


def test_only_what_a_run_wrote_is_replaced(two_checkpoints, tiny, tmp_path):
    for inside in ("", "checkpoint-2"):
        source = {
            "from_checkpoint": str(two_checkpoints / inside),
            "family": None,
            "hidden_size": 128,
            "vocab_size": 4096,
        }
        source |= {"num_hidden_layers": 4}
        with pytest.raises(ValueError, match=r"is what the run in .* would replace"):
            train_language_model(tiny(output=str(two_checkpoints), overwrite=True, **source))
    (two_checkpoints / OPTIONS_FILE).rename(two_checkpoints / "mine.json")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds a model or checkpoints, and no training_options\.json"):
            train_language_model(tiny(output=str(two_checkpoints), overwrite=overwrite))
    other = tmp_path / "other"
    other.mkdir()
    DistillOptions(teacher="x").save(other)
    with pytest.raises(ValueError, match="holds a run of `distill`"):
        train_language_model(tiny(output=str(other), overwrite=True))


def test_options_are_not_lost_by_a_kill_and_a_broken_file_is_named(tiny, tmp_path):
    tmp_path.joinpath(OPTIONS_FILE).write_text('{"task": "caus')
    with pytest.raises(ValueError, match=r"cannot be used \(training_options\.json: .*start it again with overwrite"):
        TrainingOptions.for_resume({"output": str(tmp_path)})
    tiny().save(tmp_path)
    assert TrainingOptions.load(tmp_path) == tiny()


def test_a_resumed_run_saves_in_the_interval_that_is_asked_for(tiny, ending, tmp_path):
    ending(4)
    with pytest.raises(Killed):
        train_language_model(tiny())
    ending.not_any_more()
    resume(tmp_path / "run", save_every=1, keep_checkpoints=9)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        f"checkpoint-{i}" for i in (3, 4, 5, 6)
    ]


def test_the_home_folder_is_found_behind_an_equals_sign_and_in_quotes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path / "x")
    words = ["--output=~/x", "--data", "~/x", "--from-checkpoint=~/x"]
    options = TrainingOptions(output="~/x", data=["~/x"], tokenizer="~/x")
    assert [options.output, options.data, options.tokenizer] == [home, [home], home]
    assert cli_values("train", words) == {"output": home, "data": [home], "from_checkpoint": home}
    assert cli_values("distill", ["--output=~/x", "--teacher=~/x"]) == {"output": home, "teacher": home}
    assert DistillOptions(teacher="~/x", output="~/x").output == home
    tmp_path.joinpath("x").mkdir()
    options.save(tmp_path / "x")
    resumed = TrainingOptions.for_resume({"output": "~/x", "data": ["~/x"]})
    assert asdict(resumed) == asdict(options) | {"resume": True}
    for command, given in (
        (convert, ["~/x", "~/x", "--to=sea"]),
        (explain, ["~/x", "text", "--html=~/x"]),
        (evaluate, ["~/x", "--data", "~/x"]),
        (card, ["~/x", "--output=~/x"]),
        (generate, ["~/x", "text"]),
        (demo, ["--output=~/x"]),
    ):
        assert "~/x" not in command.parser().parse(given).values(), command.__name__


def cli_values(name, words):
    from hf_linear_attn.cli import distill, train

    return {"train": train, "distill": distill}[name].parser().parse(words)


def test_a_demo_and_a_conversion_replace_no_model_of_the_user(two_checkpoints, capsys, tmp_path):
    shutil.move(two_checkpoints, tmp_path / "mine" / "leap")
    saved = bytes_of(tmp_path / "mine" / "leap")
    with pytest.raises(SystemExit):
        cli.main(["demo", "--tiny", "--output", str(tmp_path / "mine")])
    assert "holds a run that no demo has made" in capsys.readouterr().err
    folder = str(tmp_path / "mine" / "leap")
    with pytest.raises(SystemExit):
        cli.main(["convert", folder, folder, "--to", "sea", "--overwrite"])
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert bytes_of(tmp_path / "mine" / "leap") == saved
    assert Path(AutoModelForCausalLM.from_pretrained(folder).config._name_or_path).name == "leap"
