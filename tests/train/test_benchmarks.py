"""The benchmarks run at tiny sizes, and compare what they say they compare."""

import json
import sys
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import compact_weights, cpu_speed, measure, paper_wikitext, registry, report, suites
from benchmarks.kernel_attention_student import keep_kernel_attention_alone
from benchmarks.light_training import Recipe, mean_loss, train
from benchmarks.published_leap import PublishedLeap
from benchmarks.suites import danet, gpu_encoder
from hf_linear_attn.conversion import from_published, linearize
from hf_linear_attn.training.tokenized_text import TokenizedText

TINY = suites.Settings(hidden_size=32, num_layers=2, num_heads=1, vocab_size=50, lengths=(12,))


@pytest.fixture
def text():
    """Ids in a pattern that a model can learn."""
    ids = np.tile(np.arange(3, 23), 30)
    return TokenizedText(
        {"train": ids, "validation": ids[:100], "test": ids[:100]},
        dict.fromkeys(("train", "validation", "test"), 300),
        40,
    )


def test_published_form_is_the_function_that_our_model_computes():
    torch.manual_seed(0)
    published = PublishedLeap(50, 32, 1, [None, 3], positions=20).double().eval()
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


@pytest.mark.parametrize("suite", suites.SUITES)
def test_contenders_of_a_suite_run_alternately_and_fill_a_table(suite):
    jobs = suites.SUITES[suite](TINY)
    assert len(jobs) == 1
    times = measure.time_alternately(jobs[0], rounds=2, threads=1, min_seconds=0)
    assert {len(seconds) for seconds in times.values()} == {2}
    rows = measure.summarize(jobs[0], times, {})
    assert rows[0]["speed_ratio"] == 1
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert len(measure.markdown(rows).splitlines()) == 2 + len(times)


@pytest.mark.parametrize("size", [gpu_encoder.LARGE, gpu_encoder.SMALL], ids=["335M", "30M"])
def test_encoders_of_an_accelerator_are_of_one_size(size):
    """On no device."""
    with torch.device("meta"):
        models = [gpu_encoder.danet(size, 16), gpu_encoder.bert(size, 16), gpu_encoder.published(size, 16)]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert max(counts) < 1.03 * min(counts)


@pytest.mark.parametrize("suite", [pytest.param("encoder-30m", marks=pytest.mark.slow), "encoder-train-30m"])
def test_encoders_of_an_accelerator_run(suite, monkeypatch, tmp_path):
    """The whole suite with two narrow layers, its own check of our layers included."""
    monkeypatch.setattr(gpu_encoder, "SMALL", gpu_encoder.Size(16, 2, 2, 2))
    monkeypatch.setattr(gpu_encoder, "VOCABULARY", 50)
    for name in ("TOKENS", "TRAINING_TOKENS"):
        monkeypatch.setattr(gpu_encoder, name, 24)
    # Compiling on a CPU takes minutes: the blocks run as they are.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    result = registry.run_suite(suite, [12], 1, lambda name: True, tmp_path)
    assert [case.get("error") for case in result["cases"]] == [None] * 5
    assert len(report.table(tmp_path / f"{suite}.json").splitlines()) == 2 + 5


def test_ratio_is_our_speed_over_theirs():
    job = measure.Job("job", {})
    rows = measure.summarize(job, {"ours": [1.0, 1.0, 1.0], "theirs": [2.0, 2.0, 3.0]}, {"theirs": 5.0})
    assert rows[1]["speed_ratio"] == 2.0
    assert rows[1]["peak_memory_mb"] == 5.0
    assert rows[1]["speed_ratio_quartiles"] == [2.0, 2.5]


def test_decoding_from_a_state_does_the_same_work_every_time():
    job = suites.SUITES["leap-decode"](TINY)[0]
    for name in ("LEAP (ours), state", "GPT-2, cache"):
        contender = job.contenders[name]()
        for _ in range(3):
            contender.run()
        assert contender.cache.get_seq_length() <= 12 + 16


def test_speed_command_writes_a_table(tmp_path, monkeypatch, capsys):
    words = (
        "leap-train --lengths 12 --rounds 1 --hidden-size 32 --num-layers 1 --num-heads 1 --vocab-size 50 --no-memory"
    )
    monkeypatch.setattr(sys, "argv", ["cpu_speed", *words.split(), "--threads", "1", "--output", str(tmp_path)])
    threads = torch.get_num_threads()
    cpu_speed.main()
    torch.set_num_threads(threads)
    assert "| GPT-2 |" in capsys.readouterr().out
    result = json.loads((tmp_path / "cpu-leap-train.json").read_text())
    assert result["machine"]["threads"] == 1
    assert len(result["rows"]) == 3
    table = report.table(tmp_path / "cpu-leap-train.json")
    assert "threads 1" in table
    assert "| LEAP (ours) |" in table


def test_memory_that_is_known_is_not_measured_again(tmp_path, monkeypatch):
    """The speeds are new, the memory is that of the file: for a run on a machine that is quiet for some minutes only."""
    words = "danet-forward --lengths 12 16 --rounds 1 --hidden-size 32 --num-layers 3 --num-heads 1 --vocab-size 50"
    monkeypatch.setattr(sys, "argv", ["cpu_speed", *words.split(), "--threads", "1", "--output", str(tmp_path)])
    monkeypatch.setattr(cpu_speed, "_memory", lambda suite, job, names, *rest: dict.fromkeys(names, 7.0 + job))
    cpu_speed.main()
    monkeypatch.setattr(cpu_speed, "_memory", None)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--keep-memory"])
    cpu_speed.main()
    rows = json.loads((tmp_path / "cpu-danet-forward.json").read_text())["rows"]
    assert [row["peak_memory_mb"] for row in rows] == [7.0] * 4 + [8.0] * 4


def test_a_part_of_the_layers_stands_for_the_memory_of_all():
    whole = danet.Forward(danet.MODELS["BERT, SDPA"], replace(TINY, num_layers=4), 1, 12)
    part = danet.Forward(danet.MODELS["BERT, SDPA"], replace(TINY, num_layers=4, slices=2), 1, 12)
    weights = [4 * sum(p.numel() for p in each.model.parameters()) / 2**20 for each in (whole, part)]
    assert part.absent_mb == pytest.approx(weights[0] - weights[1])
    assert whole.absent_mb == 0


def test_aims_stand_beside_what_is_reached(tmp_path):
    bert = {"contender": "BERT, SDPA", "speed_ratio": 3.0, "speed_ratio_quartiles": [2.5, 3.5], "operations_ratio": 6.0}
    for size in ("30m", "330m"):
        rows = [{**bert, "job": "forward, 1 x 4,096 tokens"}] if size == "30m" else []
        (tmp_path / f"cpu-danet-forward-{size}.json").write_text(json.dumps({"rows": rows}))
    lines = report.danet_aims(tmp_path).splitlines()
    assert "| 30M | 4,096 | 2.5 | 3.00 (2.50-3.50) | 6.00 | 50% |" in lines
    assert "| 330M | 128 | 1.2 | not measured |  |  |" in lines


def test_long_runs_are_few(monkeypatch):
    """Of runs that take minutes the first is one of the rounds."""
    monkeypatch.setattr(measure, "LONG_ROUND", 0.0)

    class Counting:
        tokens, runs = 1, 0

        def run(self):
            Counting.runs += 1

    times = measure.time_alternately(measure.Job("job", {"ours": Counting}), rounds=5, threads=1, min_seconds=0)
    assert (len(times["ours"]), Counting.runs) == (2, 3), "the first run of a fast one warms up"
    monkeypatch.setattr(measure, "LONG_RUN", 0.0)
    times = measure.time_alternately(measure.Job("job", {"ours": Counting}), rounds=5, threads=1, min_seconds=0)
    assert (len(times["ours"]), Counting.runs) == (2, 5), "that of a slow one counts"
    monkeypatch.setattr(measure, "LONGEST_ROUND", 0.0)
    assert len(measure.time_alternately(measure.Job("job", {"ours": Counting}), 5, 1, min_seconds=0)["ours"]) == 1


@pytest.mark.parametrize("size", suites.SIZES)
def test_danet_encoders_have_their_contenders_parameters(size):
    """To 3 percent, at the depth that is built; positions left out, of which DANet has as many."""
    settings = replace(suites.SIZES[size], vocab_size=8)
    with torch.device("meta"):
        models = {name: make(settings, 128) for name, make in danet.MODELS.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert counts["DANet, 4 heads"] == counts["DANet, 1 head"]
    assert abs(counts["DANet, 4 heads"] / counts["BERT, SDPA"] - 1) < 0.03


def test_the_table_sets_the_ratio_beside_that_of_the_operations():
    job = measure.Job("job", {}, {"ours": 10.0, "theirs": 40.0})
    rows = measure.summarize(job, {"ours": [1.0, 1.0], "theirs": [3.0, 3.0]}, {})
    assert rows[1]["operations_ratio"] == 4.0
    assert "| 3.00 (3.00-3.00) | 4.00 | 75% |" in measure.markdown(rows)


def test_light_loop_learns_and_reports(text):
    torch.manual_seed(0)
    setting = paper_wikitext.Setting(32, 2, 1, 0.1, Recipe(length=20, batch_size=4, epochs=12, learning_rate=1e-2))
    for name in paper_wikitext.MODELS:
        model = paper_wikitext.build(name, setting, text.vocab_size)
        result = train(model, text, setting.recipe, seed=0, device="cpu")
        assert result["steps"] == 12 * (600 // 20 // 4)
        assert result["test"]["perplexity"] < 10  # of 40 tokens
        assert result["curve"][-1]["validation"] == result["validation"]["loss"]


def test_light_loop_shows_all_models_of_a_seed_the_same_batches(text):
    class Recorder(torch.nn.Linear):
        def forward(self, input_ids, labels, use_cache):
            self.seen.append(input_ids.clone())
            return Namespace(loss=self.weight.sum())

    seen = []
    for _ in range(2):
        model = Recorder(1, 1)
        model.seen = []
        train(model, text, Recipe(length=18, batch_size=4, epochs=2, precision="float32"), seed=3, device="cpu")
        seen.append(torch.stack([ids for ids in model.seen if len(ids) == 4]))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0][0], seen[0][7])


def test_windowed_and_global_differ_only_in_their_windows():
    setting = paper_wikitext.PRESETS["paper"]
    windowed, all_global = (paper_wikitext.build(name, setting, 300) for name in ("windowed", "all-global"))
    assert windowed.config.layer_windows == [None, 4, 8, 16, None, 4]
    assert all_global.config.layer_windows == [None] * 6
    assert windowed.config.attention_dropout == all_global.config.hidden_dropout_prob == 0.1
    gpt2 = paper_wikitext.build("gpt2", setting, 300)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (windowed, all_global, gpt2)]
    assert max(sizes) < 1.01 * min(sizes)


def test_a_grid_of_runs_is_not_repeated_and_makes_a_table(tmp_path, monkeypatch, capsys, text):
    setting = paper_wikitext.PRESETS["paper"]
    tiny = replace(setting, hidden_size=32, num_layers=1, num_heads=1, recipe=Recipe(length=20, epochs=1))
    monkeypatch.setitem(paper_wikitext.PRESETS, "paper", tiny)
    text.save(tmp_path / "tokens.npz")
    options = Namespace(
        output=tmp_path,
        data=tmp_path / "tokens.npz",
        preset="paper",
        models=["windowed", "gpt2"],
        seeds=[0, 1],
        jobs=1,
        threads=torch.get_num_threads(),
        device="cpu",
        max_steps=2,
        compile=False,
    )
    paper_wikitext.run(options)
    assert len(list(tmp_path.glob("paper-*-seed*.json"))) == 4
    monkeypatch.setattr(paper_wikitext, "train_one", None)  # would fail if a run was repeated
    paper_wikitext.run(options)
    assert "4 runs, of which 4 are done" in capsys.readouterr().out


def test_mean_loss_weighs_a_short_last_batch_by_its_rows():
    class First(torch.nn.Module):
        def forward(self, input_ids, labels, use_cache):
            return Namespace(loss=input_ids.float().mean())

    blocks = torch.arange(5).repeat_interleave(4).view(5, 4)
    assert mean_loss(First(), blocks, Recipe(batch_size=2, precision="float32")) == pytest.approx(2.0)


def test_packed_weights_come_back_close_with_their_vocabulary(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
        )
    ).eval()  # fmt: skip
    ids = np.array([[5, 9, 30, 7, 5, 22]])
    kept = compact_weights.used_tokens(ids, always=(1, 2))
    assert kept.tolist() == [1, 2, 5, 7, 9, 22, 30]
    few = torch.from_numpy(compact_weights.renumber(ids, kept).astype(np.int64))
    wanted = model(torch.from_numpy(ids)).logits[..., torch.from_numpy(kept)]
    sizes = compact_weights.input_sizes(model, torch.from_numpy(ids))
    assert "model.layers.0.mlp.down_proj.weight" in sizes
    errors = []
    for step, used in ((0.02, None), (0.02, sizes), (0.4, sizes)):
        compact_weights.pack(model, kept, tmp_path / "weights.npz", step, step, used)
        back = compact_weights.unpack(tmp_path / "weights.npz", AutoModelForCausalLM).eval()
        assert back.lm_head.weight is back.model.embed_tokens.weight
        assert (back.config.bos_token_id, back.config.eos_token_id) == (0, 1)
        errors.append(float((back(few).logits - wanted).norm() / wanted.norm()))
    assert max(errors[:2]) < 0.03 < errors[2] < 0.9


def test_kernel_attention_student_is_kernel_attention():
    teacher = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    ).eval()
    student = keep_kernel_attention_alone(linearize(teacher, "sea", k=4, predictor_length=16)).eval()
    assert student.sea_layers()[0].__class__.__name__ == "KernelAttentionCore"
    ids = torch.randint(3, 40, (2, 9))
    logits = student(ids, use_cache=False).logits
    changed = ids.clone()
    changed[:, 5:] = 3
    torch.testing.assert_close(student(changed, use_cache=False).logits[:, :5], logits[:, :5])
    assert not torch.allclose(logits, teacher(ids).logits, atol=1e-3)
