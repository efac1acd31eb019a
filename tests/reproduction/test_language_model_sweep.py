"""The comparison of language models: what a sweep still has to train, and the bytes of its corpus."""

import hashlib
import json

import pytest

from reproduction import language_models
from reproduction.__main__ import main
from reproduction.corpora import load_text, save_bytes
from reproduction.language_model_contenders import MODELS, VARIANTS, Setting, build
from reproduction.language_model_report import best_rate
from reproduction.language_models import Run, wanted
from reproduction.training import Hyperparameters

pytestmark = pytest.mark.slow

RATES = (1e-3, 3e-3, 9e-3)


def result(rate, loss, seed=0):
    return {"rate": rate, "seed": seed, "validation": {"loss": loss}}


def test_rates_come_first():
    assert wanted("leap", [result(1e-3, 5.0)], RATES, [0, 1], 1) == [Run("leap", 3e-3, 0), Run("leap", 9e-3, 0)]


def test_a_best_rate_at_an_edge_asks_for_one_beyond_it_and_no_more_than_allowed():
    falling = [result(1e-3, 5.0), result(3e-3, 4.0), result(9e-3, 3.0)]
    assert wanted("leap", falling, RATES, [0, 1], 1) == [Run("leap", 0.027, 0)]
    assert wanted("leap", [*falling, result(0.027, 2.0)], RATES, [0, 1], 1) == [Run("leap", 0.027, 1)]
    assert wanted("leap", falling, RATES, [0, 1], 0) == [Run("leap", 9e-3, 1)]


def test_the_other_seeds_run_at_the_best_rate_until_all_are_there():
    done = [result(1e-3, 5.0), result(3e-3, 4.0), result(9e-3, float("nan"))]
    assert best_rate(done, 0) == 3e-3
    assert wanted("leap", done, RATES, [0, 1, 2], 1) == [Run("leap", 3e-3, 1), Run("leap", 3e-3, 2)]
    done += [result(3e-3, 4.1, 1), result(3e-3, 4.2, 2)]
    assert wanted("leap", done, RATES, [0, 1, 2], 1) == []


def test_bytes_are_cut_into_splits_and_come_back(tmp_path):
    data = bytes(range(200))
    facts = save_bytes(data, tmp_path / "text.xz", {"train": 50, "validation": 5, "test": 7})
    text, read = load_text(tmp_path / "text.xz")
    assert read == facts
    assert facts["corpus_sha256"] == hashlib.sha256(data).hexdigest()
    assert {split: bytes(ids) for split, ids in text.ids.items()} == {
        "train": data[:50],
        "validation": data[180:185],
        "test": data[190:197],
    }
    assert facts["corpus"] == "docs8-slice"
    assert save_bytes(data, tmp_path / "whole.xz", {"validation": 5})["corpus"] == "docs8"
    (tmp_path / "text.json").write_text((tmp_path / "text.json").read_text().replace(facts["sha256"], "0" * 64))
    with pytest.raises(ValueError, match="is not the file"):
        load_text(tmp_path / "text.xz")


@pytest.mark.parametrize("name", [*MODELS, *VARIANTS])
def test_contenders_have_as_many_parameters_as_gpt2(name):
    setting = Setting(64, 3, 2, Hyperparameters(length=32))
    count, target = (sum(p.numel() for p in build(each, setting, 300).parameters()) for each in (name, "gpt2"))
    assert abs(count / target - 1) < 0.015


def test_a_sweep_asks_again_after_each_wave_and_leaves_what_failed(tmp_path, monkeypatch):
    """Rates of both models first, then the best rate's other seed; a run that leaves no result is not started again."""
    (tmp_path / "text.json").write_text('{"corpus": "speeches"}')
    (tmp_path / "text.npz").touch()
    waves = []

    def pretend(commands, jobs):
        waves.append([file.name for file in commands])
        for file, words in commands.items():
            rate, seed = words[words.index("--one") + 1 :]
            if file.name.startswith("speeches-gpt2"):
                found = result(float(rate), 1 / float(rate), int(seed)) | {"corpus": "speeches", "model": "gpt2"}
                file.write_text(json.dumps(found))

    monkeypatch.setattr(language_models, "run_together", pretend)
    words = ["language-models", "sweep", "--data", tmp_path / "text.npz", "--output", tmp_path, "--extra-rates", "0"]
    main([*map(str, words), "--models", "gpt2", "llama", "--rates", "1e-3", "3e-3", "--seeds", "0", "1"])
    rates = [f"speeches-{model}-rate{rate}-seed0.json" for model in ("gpt2", "llama") for rate in ("0.001", "0.003")]
    assert waves == [rates, ["speeches-gpt2-rate0.003-seed1.json"]]
