"""The recipe encoder-tasks: who is trained with which rate and seed, without training anybody."""

import json
from pathlib import Path

import pytest

from reproduction import encoder_tasks
from reproduction.__main__ import main
from reproduction.encoder_tasks import PRESETS
from reproduction.recipe import REPORT

pytestmark = pytest.mark.slow


def value_of(words, flag):
    return str(words[[str(word) for word in words].index(flag) + 1])


@pytest.fixture
def started(monkeypatch):
    """Names of the runs in the order in which they would start; each leaves a report whose quality is its rate."""
    names = []

    def pretend(commands, jobs, gpus=()):
        for folder, words in commands.items():
            words = [str(word) for word in words]
            rate, masked = float(value_of(words, "--learning-rate")), "mlm" in words
            start = value_of(words, "--from-checkpoint") if "--from-checkpoint" in words else None
            family = Path(start).name.split("-")[1] if start else value_of(words, "--family")
            good = min(rate, 2e-3)  # the best rate is the one just above 2e-3 or the largest
            options = {"learning_rate": rate, "seed": 0 if masked else int(value_of(words, "--seed"))}
            options |= {"output": str(folder), "from_checkpoint": start}
            options["config"] = [value_of(words, "--config")] if "--config" in words else []
            good += 1e-4 * len(options["config"])  # any change is a little better
            scores = {"loss": -good, "accuracy": good, "macro_f1": good / 2}
            report = {"family": family, "parameters": 1, "steps": 2, "training_tokens": 3, "training_seconds": 4.0}
            report |= {"validation": scores, "test": scores, "options": options, "machine": {}}
            folder.mkdir(parents=True)
            (folder / REPORT).write_text(json.dumps(report))
            names.append(folder.name)

    monkeypatch.setattr(encoder_tasks, "run_together", pretend)
    return names


def test_other_seeds_take_the_best_rate(started, tmp_path, capsys):
    main(
        [
            "encoder-tasks",
            "run",
            "--preset",
            "small",
            "--output",
            str(tmp_path),
            "--sets",
            "r8",
            "bbc",
            "--seeds",
            "3",
            "4",
        ]
    )
    rates = PRESETS["small"].finetuning_rates
    for family in ("danet", "bert"):
        for start in ("pretrained", "new"):
            for data in ("r8", "bbc"):
                runs = [name for name in started if name.startswith(f"{data}-{family}-{start}-")]
                first = [f"{data}-{family}-{start}-{rate:g}-seed3" for rate in rates[family]]
                best = next((rate for rate in rates[family] if rate >= 2e-3), rates[family][-1])
                assert runs == [*first, f"{data}-{family}-{start}-{best:g}-seed4"]
    assert len(rates["danet"]) == len(rates["bert"]), "as many rates for each family"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| r8 | danet | pretrained")]
    tried = "0.0001: 0.0, 0.0003: 0.0, 0.001: 0.1, 0.003: 0.2"
    assert lines == [f"| r8 | danet | pretrained | 0.003 | 2 | 0.20 (0.20 to 0.20) | 0.10 (0.10 to 0.10) | {tried} |"]


def test_the_comparison_comes_before_new_weights(started, tmp_path):
    main(["encoder-tasks", "run", "--preset", "small", "--output", str(tmp_path), "--sets", "r8", "--seeds", "0", "1"])
    kinds = ["new" if "-new-" in name else "pretrained" for name in started if "seed" in name]
    assert kinds == sorted(kinds, reverse=True)


def test_steps_rates_and_starts_of_the_command_line(started, tmp_path, capsys):
    words = "--pretraining-rates danet=2e-3 bert=1e-4,3e-4 --finetuning-rates bert=5e-4 --starts pretrained --seeds 0"
    main(["encoder-tasks", "run", "--preset", "tiny", "--output", str(tmp_path), "--sets", "r8", *words.split()])
    pretrained = {name for name in started if name.startswith("mlm-")}
    assert pretrained == {"mlm-danet-0.002", "mlm-bert-0.0001", "mlm-bert-0.0003"}
    rates = PRESETS["tiny"].finetuning_rates["danet"]
    expected = {f"r8-danet-pretrained-{rate:g}-seed0" for rate in rates} | {"r8-bert-pretrained-0.0005-seed0"}
    assert set(started) - pretrained == expected
    with pytest.raises(SystemExit):
        main(["encoder-tasks", "run", "--finetuning-rates", "gpt2=1e-3"])
    assert "danet, bert" in capsys.readouterr().err


def test_a_change_of_the_model_is_one_more_choice_at_every_rate(started, tmp_path, capsys):
    words = "--finetuning-rates danet=1e-3,3e-3 bert=1e-4 --finetuning-config danet=pooler=max --starts pretrained"
    main(
        [
            "encoder-tasks",
            "run",
            "--preset",
            "tiny",
            "--output",
            str(tmp_path),
            "--sets",
            "r8",
            "--seeds",
            "0",
            "1",
            *words.split(),
        ]
    )
    kinds = ("0.001", "0.003", "0.001-pooler=max", "0.003-pooler=max")
    runs = [name for name in started if name.startswith("r8-danet")]
    first = [f"r8-danet-pretrained-{kind}-seed0" for kind in kinds]
    assert runs == [*first, "r8-danet-pretrained-0.003-pooler=max-seed1"]
    assert [name for name in started if name.startswith("r8-bert") and "pooler" in name] == []
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| r8 | danet")]
    assert lines[0].startswith("| r8 | danet | pretrained | 0.003 with pooler=max | 2 |")
