"""The benchmarks run at tiny sizes, and compare what they say they compare."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import harness, peers, report
from benchmarks.__main__ import main
from benchmarks.harness import SUITES, Case, Work
from benchmarks.private import private
from benchmarks.suites import danet, gpu_encoder, leap
from hf_linear_attn.conversion import from_published

IN_TURNS = [
    name
    for name, module in SUITES.items()
    if module in ("leap", "danet", "sea_models") and not name.endswith(("330m", "bfloat16"))
]
ALONE = [name for name, module in SUITES.items() if module.startswith("gpu_")]
QUICK = ("encoder-train-30m",)


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    monkeypatch.setattr(harness, "TURN", 0.0)
    # Compiling on a CPU takes minutes: blocks and models run as they are.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)


def measured(suite, folder, *words):
    """The JSON of a suite at its tiny sizes."""
    file = folder / f"{suite}.json"
    main([suite, "--quick", "--rounds", "1", "--threads", "1", "--out", str(file), *words])
    return json.loads(file.read_text())


def test_published_form_is_the_function_that_our_model_computes():
    torch.manual_seed(0)
    published = peers.PublishedLeap(50, 32, 1, [None, 3], positions=20).double().eval()
    config = {
        "vocab_size": 50,
        "hidden_size": 32,
        "n_head": 1,
        "n_layer": 2,
        "window_sizes": [20, 3],
        "n_positions": 20,
    }
    ours = from_published("leap", config, published.state_dict()).double().eval()
    ids = torch.randint(0, 50, (2, 20))
    torch.testing.assert_close(ours(ids, labels=ids).logits, published(ids), atol=1e-10, rtol=0)
    torch.testing.assert_close(ours(ids, labels=ids).loss, published(ids, labels=ids), atol=1e-10, rtol=0)


@pytest.mark.parametrize("suite", IN_TURNS)
def test_contenders_of_a_suite_take_turns_and_fill_a_table(suite, tmp_path, capsys):
    rows = measured(suite, tmp_path, "--no-memory", "--rounds", "2")["rows"]
    assert len({row["job"] for row in rows}) == 1
    assert {row["rounds"] for row in rows} == {2}
    assert rows[0]["speed_ratio"] == 1
    assert all(row["tokens_per_second"] > 0 for row in rows)
    capsys.readouterr()
    main(["table", str(tmp_path / f"{suite}.json")])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 + len(rows)


@pytest.mark.parametrize(
    "suite", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in ALONE]
)
def test_suites_of_a_gpu_run_on_a_cpu(suite, tmp_path, capsys):
    """The whole suite with narrow layers, its own checks of ours included."""
    cases = measured(suite, tmp_path)["cases"]
    allowed = "AssertionError: Float8" if suite == "float8" else None
    errors = {case["name"]: case["error"] for case in cases if "error" in case}
    assert all(allowed and error.startswith(allowed) for error in errors.values()), errors
    assert len(cases) - len(errors) >= 2
    if suite in QUICK:
        assert all("check_error" in case for case in cases if ", ours" in case["name"])
    capsys.readouterr()
    main(["table", str(tmp_path / f"{suite}.json")])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len({case["name"] for case in cases})


@pytest.mark.parametrize("size", [gpu_encoder.LARGE, gpu_encoder.SMALL], ids=["335M", "30M"])
def test_encoders_of_an_accelerator_are_of_one_size(size):
    """On no device."""
    with torch.device("meta"):
        models = [gpu_encoder.danet(size, 16), gpu_encoder.bert(size, 16), gpu_encoder.published(size, 16)]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert max(counts) < 1.03 * min(counts)


def test_a_case_whose_check_fails_is_refused():
    case = Case("ours", 8, lambda: Work(lambda: None, 1), check=lambda: (0.2, 0.1))
    assert harness.measure(case, 1)["error"] == "refused: error 2.00e-01, allowed 1.00e-01"
    assert "error" in harness.measure(replace(case, check=lambda: (float("nan"), 0.1)), 1)
    assert harness.measure(replace(case, check=lambda: (0.05, 0.1)), 1)["ktokens_per_s"] > 0


def job(**operations):
    """Two contenders that do nothing."""
    return [
        Case(name, 1, lambda: Work(lambda: None, 1), job="job", operations=count) for name, count in operations.items()
    ]


def test_ratio_is_our_speed_over_theirs():
    times = {"ours": [1.0, 1.0, 1.0], "theirs": [2.0, 2.0, 3.0]}
    rows = harness.summarize(job(ours=None, theirs=None), times, {"theirs": 5.0})
    assert rows[1]["speed_ratio"] == 2.0
    assert rows[1]["peak_memory_mb"] == 5.0
    assert rows[1]["speed_ratio_quartiles"] == [2.0, 2.5]


def test_decoding_from_a_state_does_the_same_work_every_time():
    for case in leap.decoding(leap.QUICK, 12)[:2]:
        work = case.make()
        for _ in range(3):
            cache = work.step()
        assert cache.get_seq_length() == 12 + 16


def test_a_suite_writes_its_machine_and_a_table(tmp_path, capsys):
    threads = torch.get_num_threads()
    result = measured("leap-train", tmp_path, "--no-memory", "--only", "ours", "GPT-2")
    assert torch.get_num_threads() == threads
    assert result["machine"]["threads"] == 1
    assert [row["contender"] for row in result["rows"]] == ["LEAP (ours)", "GPT-2"]
    assert "| GPT-2 |" in capsys.readouterr().out
    table = report.table(tmp_path / "leap-train.json")
    assert "threads 1" in table
    assert "| LEAP (ours) |" in table


def test_memory_that_is_known_is_not_measured_again(tmp_path, monkeypatch):
    """The speeds are new, the memory is that of the file: for a run on a machine that is quiet for some minutes only."""
    monkeypatch.setattr(harness, "peak_memory", lambda options, number: 7.0 + number)
    measured("danet-forward-30m", tmp_path, "--only", "DANet")
    monkeypatch.setattr(harness, "peak_memory", None)
    rows = measured("danet-forward-30m", tmp_path, "--only", "DANet", "--no-memory")["rows"]
    assert [row["peak_memory_mb"] for row in rows] == [7.0, 8.0]


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    """Which measures the case that was asked for, at the sizes that were."""
    rows = measured("leap-train", tmp_path, "--only", "ours", "GPT-2")["rows"]
    assert all(0 < row["peak_memory_mb"] < 500 for row in rows)


def test_what_was_measured_stays_where_asked_for(tmp_path):
    first = measured("train", tmp_path, "--only", "GPT-2, SDPA", "--skip", "compiled")
    assert [case["name"] for case in first["cases"]] == ["GPT-2, SDPA"]
    both = measured("train", tmp_path, "--only", "GPT-2, SDPA, compiled", "--add")
    assert [case["name"] for case in both["cases"]] == ["GPT-2, SDPA", "GPT-2, SDPA, compiled"]


def test_two_checkouts_are_compared_by_medians(tmp_path):
    for name, times in {"old": (2.0, 1.0, 9.0), "new": (1.0, 5.0, 1.5)}.items():
        for number, ms in enumerate(times):
            cases = [{"name": "ours, step", "length": 1024, "ms": ms}, {"name": "broken", "length": 1, "error": "no"}]
            (tmp_path / f"{name}-{number}.json").write_text(json.dumps({"cases": cases}))
    files = [sorted(tmp_path.glob(f"{name}-*.json")) for name in ("old", "new")]
    assert report.compare(*files).splitlines()[2:] == ["| ours, step | 1,024 | 2.000 | 1.500 | 0.750 |"]


def test_names_that_moved_are_found():
    assert private("RecurrentCache").__name__ == "RecurrentCache"
    with pytest.raises(ImportError, match="defines no_such_thing"):
        private("no_such_thing")


def test_a_part_of_the_layers_stands_for_the_memory_of_all():
    size = replace(danet.QUICK, layers=4)
    bert = danet.MODELS["BERT, SDPA"]
    whole, part = (danet.build_model(bert, each, torch.float32, 1, 12) for each in (size, replace(size, slices=2)))
    weights = [4 * sum(p.numel() for p in model.parameters()) / 2**20 for model, *_ in (whole, part)]
    assert part[2] == pytest.approx(weights[0] - weights[1])
    assert whole[2] == 0


def test_aims_stand_beside_what_is_reached(tmp_path):
    bert = {"contender": "BERT, SDPA", "speed_ratio": 3.0, "speed_ratio_quartiles": [2.5, 3.5], "operations_ratio": 6.0}
    for size in ("30m", "330m"):
        rows = [{**bert, "job": "forward, 1 x 4,096 tokens"}] if size == "30m" else []
        (tmp_path / f"cpu-danet-forward-{size}.json").write_text(json.dumps({"rows": rows}))
    lines = report.danet_aims(tmp_path).splitlines()
    assert "| 30M | 4,096 | 2.5 | 3.00 (2.50-3.50) | 6.00 | 50% |" in lines
    assert "| 330M | 128 | 1.2 | not measured |  |  |" in lines


def test_long_jobs_have_few_rounds(monkeypatch):
    """No round begins after the time of a job; the first call of each is no measurement."""
    calls = []
    case = Case("ours", 1, lambda: Work(partial(calls.append, None), 1), job="job")
    assert len(harness.measure_in_turns([case], rounds=3, threads=1)["ours"]) == 3
    monkeypatch.setattr(harness, "LONG_JOB", 0.0)
    calls.clear()
    assert len(harness.measure_in_turns([case], rounds=3, threads=1)["ours"]) == 1
    assert len(calls) >= 2


@pytest.mark.parametrize("size", danet.SIZES)
def test_danet_encoders_have_their_contenders_parameters(size):
    """To 3 percent, at the depth that is built; positions left out, of which DANet has as many."""
    settings = replace(danet.SIZES[size], vocabulary=8)
    with torch.device("meta"):
        models = {name: make(settings, 128) for name, make in danet.MODELS.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert counts["DANet, 4 heads"] == counts["DANet, 1 head"]
    assert abs(counts["DANet, 4 heads"] / counts["BERT, SDPA"] - 1) < 0.03


def test_the_table_sets_the_ratio_beside_that_of_the_operations():
    times = {"ours": [1.0, 1.0], "theirs": [3.0, 3.0]}
    rows = harness.summarize(job(ours=10.0, theirs=40.0), times, {})
    assert rows[1]["operations_ratio"] == 4.0
    assert "| 3.00 (3.00-3.00) | 4.00 | 75% |" in report.comparison(rows)
