"""Options of a run and the command line made of them."""

import pytest

from hf_linear_attn.cli import main as cli
from hf_linear_attn.cli.train import parser
from hf_linear_attn.training.options import TrainingOptions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "leep"}, "family must be one of leap"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 does not divide hidden_size=128"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be greater than 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"output": ""}, "output is empty"),
        ({"data": ["a.txt", ""]}, "data is empty"),
        ({"steps": 5, "epochs": 1.0}, "steps or epochs"),
        ({"block_length": 1}, "block_length must be at least 2"),
        ({"vocab_size": 100}, "vocab_size must be at least 259"),
        ({"windows": "global,4"}, "windows lists 2 layers, and num_hidden_layers is 4"),
        ({"windows": "global,0,4,8"}, "windows must list .* got '0'"),
        ({"windows": "global,4,8,16", "all_global": True}, "contradict"),
        ({"config": ["initializer_range"]}, "KEY=VALUE"),
        ({"data": ["a.txt"], "dataset": "x"}, "not both"),
        ({"resume": True, "overwrite": True}, "overwrite"),
    ],
)
def test_wrong_options_are_named_with_the_legal_range(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**values)


def test_windows_and_config_fields_are_read():
    options = TrainingOptions(windows="global, 4,8,None", config=["initializer_range=0.5", "name=text", "flag=true"])
    assert options.layer_windows() == [None, 4, 8, None]
    assert options.config_fields() == {"initializer_range": 0.5, "name": "text", "flag": True}


def test_command_line_gives_every_field_and_only_what_was_given():
    given = parser().parse(["--steps", "7", "--all-global", "--data", "a.txt", "b.txt", "--learning-rate", "1e-3"])
    assert given == {"steps": 7, "all_global": True, "data": ["a.txt", "b.txt"], "learning_rate": 1e-3}
    assert TrainingOptions(**given).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "--familly", "leap"], "did you mean '--family'"),
        (["train", "--learning_rate=1"], "did you mean '--learning-rate'"),
        (["train", "--family", "gpt3"], "did you mean 'gpt2'"),
        (["train", "--steps", "many"], "invalid int value: 'many'"),
        (["train", "--dropout", "2"], "dropout must be at least 0"),
        (["train", "extra"], "unexpected argument 'extra'"),
        (["generate"], "required: prompt"),
        (["generate", "x/y/z", "prompt"], "there is no folder 'x/y/z'"),
    ],
)
def test_wrong_calls_end_with_code_2_and_a_hint(words, message, capsys):
    try:
        code = cli.main(words)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "--help"], ["demo", "--help"]])
def test_help_teaches_with_an_example(words, capsys):
    try:
        code = cli.main(words)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 0
    assert "hf-linear-attn " in capsys.readouterr().out


def test_errors_a_user_can_put_right_come_without_a_stack(tmp_path, capsys):
    assert cli.main(["train", "--data", str(tmp_path / "absent.txt"), "--output", str(tmp_path / "run")]) == 1
    assert "absent.txt" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said_before_the_text_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("hf_linear_attn.training.language_modeling.load_text", lambda _: pytest.fail("it was read"))
    assert cli.main(["train", "--output", str(tmp_path / "file" / "run")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
