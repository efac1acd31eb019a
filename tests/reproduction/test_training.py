"""How the reproductions train, at tiny sizes, and the models that they compare."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_linear_attn.conversion import linearize
from hf_linear_attn.training.tokenized_text import TokenizedText
from reproduction import compact_weights, faithfulness, paper_wikitext
from reproduction.__main__ import main
from reproduction.kernel_attention_student import keep_kernel_attention_alone
from reproduction.training import Hyperparameters, mean_loss, train

pytestmark = pytest.mark.slow


@pytest.fixture
def text():
    """Ids in a pattern that a model can learn."""
    ids = np.tile(np.arange(3, 23), 30)
    return TokenizedText(
        {"train": ids, "validation": ids[:100], "test": ids[:100]},
        dict.fromkeys(("train", "validation", "test"), 300),
        40,
    )


def test_models_learn_and_report(text):
    torch.manual_seed(0)
    setting = paper_wikitext.Setting(
        32, 2, 1, 0.1, Hyperparameters(length=20, batch_size=4, epochs=12, learning_rate=1e-2)
    )
    for name in paper_wikitext.MODELS:
        model = paper_wikitext.build(name, setting, text.vocab_size)
        result = train(model, text, setting.recipe, seed=0, device="cpu")
        assert result["steps"] == 12 * (600 // 20 // 4)
        assert result["test"]["perplexity"] < 10  # of 40 tokens
        assert result["curve"][-1]["validation"] == result["validation"]["loss"]


def test_all_models_of_a_seed_see_the_same_batches(text):
    class Output(dict):
        loss = property(lambda self: self["loss"])

    class Recorder(torch.nn.Linear):
        def forward(self, input_ids, labels, use_cache):
            self.seen.append(input_ids.clone())
            return Output(loss=self.weight.sum())

    seen = []
    for _ in range(2):
        model = Recorder(1, 1)
        model.seen = []
        train(
            model, text, Hyperparameters(length=18, batch_size=4, epochs=2, precision="float32"), seed=3, device="cpu"
        )
        seen.append(torch.stack([ids for ids in model.seen if len(ids) == 4]))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0][0], seen[0][7])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_is_that_of_transformers_schedules(schedule):
    from transformers import get_scheduler

    plan = Hyperparameters(schedule=schedule, warmup=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(schedule, optimizer, 10, 100)
    for step in range(100):
        assert plan.rate(step / 100) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        scheduler.step()


def test_a_run_ends_with_its_time(text):
    """The rate follows the clock then, and the last point of the curve is the end."""
    torch.manual_seed(0)
    plan = Hyperparameters(length=20, batch_size=4, epochs=10**6, seconds=1.0, evaluations=2, precision="float32")
    model = paper_wikitext.build("windowed", paper_wikitext.Setting(32, 1, 1, 0.0, plan), text.vocab_size)
    result = train(model, text, plan, seed=0, device="cpu")
    assert len(result["curve"]) == 2
    assert 1.0 <= result["training_seconds"] < 3.0
    assert result["steps"] == result["curve"][-1]["step"]


def test_classifiers_learn_and_are_explained(tmp_path, monkeypatch):
    """Texts of which one word says the label."""
    monkeypatch.setattr(faithfulness, "SHARES", (0.5,))
    texts = {
        split: {"text": ["a good day for all of us", "a bad day for all of us"] * 8, "label": [0, 1] * 8}
        for split in ("train", "test")
    }
    (tmp_path / "texts.json").write_text(json.dumps(texts | {"labels": ["good", "bad"]}))
    words = ["--data", tmp_path / "texts.json", "--output", tmp_path, "--steps", 30, "--batch-size", 8, "--texts", 2]
    words += ["--models", "leap", "sea", "--vocab-size", 300, "--device", "cpu"]
    main(["faithfulness", "run", *map(str, words)])
    for model in ("leap", "sea"):
        result = json.loads((tmp_path / f"{model}-seed0.json").read_text())
        assert result["accuracy"] == 1.0


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
    tiny = replace(setting, hidden_size=32, num_layers=1, num_heads=1, recipe=Hyperparameters(length=20, epochs=1))
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
    assert mean_loss(First(), blocks, Hyperparameters(batch_size=2, precision="float32")) == pytest.approx(2.0)


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
