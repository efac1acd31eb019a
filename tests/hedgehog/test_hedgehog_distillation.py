"""Distillation into Hedgehog: what each stage trains and reaches, by hand and by command, interrupted or not."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, set_seed

from hf_linear_attn.cli.main import main
from hf_linear_attn.conversion import linearize
from hf_linear_attn.hub.cards import build_card
from hf_linear_attn.training import hedgehog_distillation
from hf_linear_attn.training.checkpoints import StopOnSignal
from hf_linear_attn.training.distill import REPORT_FILE
from hf_linear_attn.training.distill_options import DistillOptions
from hf_linear_attn.training.hedgehog_distillation import (
    HedgehogDistillationArguments,
    HedgehogDistillationTrainer,
    compare_predictions,
    cut_rows,
)
from hf_linear_attn.training.tokenized_text import train_bpe_tokenizer

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
}
SENTENCE = "the people of the united states in order to form a more perfect union establish justice"


def teacher_of(**changes):
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes))


class Rows(torch.utils.data.Dataset):
    """Random texts, padded where that is asked for."""

    def __init__(self, count=16, length=32, padded=False):
        self.ids = torch.randint(3, 40, (count, length), generator=torch.Generator().manual_seed(1))
        self.padded = padded

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        row = {"input_ids": self.ids[i], "labels": self.ids[i]}
        if self.padded:
            row["attention_mask"] = (torch.arange(self.ids.shape[1]) >= i % 5).long()
        return row


def make_trainer(folder, student=None, teacher=None, rows=None, **arguments):
    teacher = teacher or teacher_of()
    student = linearize(teacher, "hedgehog", window=4, softmax_layers=[1]) if student is None else student
    options = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    arguments = HedgehogDistillationArguments(**(options | arguments))
    rows = Rows() if rows is None else rows
    return HedgehogDistillationTrainer(student, teacher, arguments, train_dataset=rows, eval_dataset=rows)


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_attention_transfer_lowers_the_error_of_every_linear_layer_and_trains_nothing_else(padded, tmp_path):
    rate = {"transfer_learning_rate": 5e-2}
    trainer = make_trainer(tmp_path, rows=Rows(padded=padded), max_steps=30, transfer_share=1.0, **rate)
    student, teacher = weights_of(trainer.model), weights_of(trainer.teacher)
    before = trainer.layer_errors()
    assert before["layers"] == [0, 2]
    trainer.train()
    after = trainer.stages.layers
    assert all(ours < 0.95 * theirs for ours, theirs in zip(after["alone"], before["alone"], strict=True))
    changed = {name for name, value in weights_of(trainer.model).items() if not torch.equal(value, student[name])}
    added = {name for name in student if ".hedgehog." in name}
    assert changed == added
    assert all(torch.equal(value, teacher[name]) for name, value in weights_of(trainer.teacher).items())


def test_a_layer_learns_from_the_teachers_inputs_alone(tmp_path):
    """Its gradient is the same whatever the layers before it have become."""
    grads = []
    for scale in (1.0, 3.0):
        trainer = make_trainer(tmp_path)
        batch = {"input_ids": Rows(4).ids, "labels": Rows(4).ids}
        with torch.no_grad():
            trainer.model.hedgehog_layers()[0].key_map.mul_(scale)
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        grads.append(trainer.model.hedgehog_layers()[2].query_map.grad)
        with_gradient = {name for name, p in trainer.model.named_parameters() if p.grad is not None}
        assert with_gradient == {name for name, p in trainer.model.named_parameters() if ".hedgehog." in name}
    torch.testing.assert_close(*grads)


def test_the_second_stage_trains_all_weights_and_lowers_the_kl(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=30, transfer_share=0.2, learning_rate=3e-3, task_weight=0.1)
    before = trainer.evaluate()
    start = weights_of(trainer.model)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_logits_kl"] < 0.7 * before["eval_logits_kl"]
    assert after["eval_teacher_loss"] == pytest.approx(before["eval_teacher_loss"])
    assert not any(torch.equal(value, start[name]) for name, value in weights_of(trainer.model).items())
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry}
    assert rates[5] == 0.0 < rates[30] < max(rates.values()) <= 3e-3
    terms = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "attention_error" in terms[0]
    assert terms[-1]["loss"] == pytest.approx(terms[-1]["logits_kl"] + 0.1 * terms[-1]["task_loss"], rel=1e-4)


def test_the_loss_of_an_evaluation_is_that_of_the_models(tmp_path):
    """Padding and all; the teacher's, too."""
    rows = Rows(padded=True)
    trainer = make_trainer(tmp_path, rows=rows, per_device_eval_batch_size=16)
    found = trainer.evaluate()
    batch = trainer.data_collator([rows[i] for i in range(16)])
    expected = trainer.model.eval()(**batch)
    assert found["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = torch.stack([row.masked_fill(torch.arange(32) <= i % 5, -100) for i, row in enumerate(labels)])
    teacher = trainer.teacher(**batch | {"labels": labels}, position_ids=positions)
    assert found["eval_teacher_loss"] == pytest.approx(teacher.loss.item(), rel=1e-5)


def test_predictions_in_blocks_are_those_at_once(monkeypatch):
    """KL and cross-entropies with their gradients, in float64."""
    set_seed(0)
    heads = [torch.nn.Linear(6, 11).double() for _ in range(2)]
    theirs, labels = torch.randn(2, 9, 6).double(), torch.randint(11, (2, 9))
    labels[0, :3] = -100
    mask = torch.arange(9) < torch.tensor([[7], [9]])
    ours = torch.randn(2, 9, 6).double().requires_grad_()
    results = []
    for rows in (4, 1000):
        monkeypatch.setattr(hedgehog_distillation, "SMALL_BLOCK_ELEMENTS", rows * 11)
        sums = compare_predictions(ours, theirs, *heads, labels, mask)
        results.append((sums, *torch.autograd.grad(sums[0] + 2 * sums[1], (ours, heads[0].weight))))
    logits, wanted = heads[0](ours), heads[1](theirs).detach()
    kl = (wanted.softmax(-1) * (wanted.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)[mask].sum()
    entropies = [F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="sum") for x in (logits, wanted)]
    expected = torch.stack((kl, *entropies))
    expected = (expected, *torch.autograd.grad(expected[0] + 2 * expected[1], (ours, heads[0].weight)))
    for result in results:
        for found, value in zip(result, expected, strict=True):
            torch.testing.assert_close(found, value, atol=1e-12, rtol=1e-10)


def test_minutes_end_the_run_and_are_shared_by_the_stages(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=10_000, minutes=0.05, transfer_share=0.5)
    trainer.train()
    assert 2 <= trainer.state.global_step < 10_000
    assert trainer.stages.layers  # the first stage has ended
    assert trainer.stages.name == "predictions"


def test_rows_are_cut_to_the_length_of_a_stage():
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(cut_rows({"input_ids": ids}, 4)["input_ids"], torch.arange(24).view(6, 4))
    for wrong in ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": ids[:, :11]}):
        with pytest.raises(ValueError, match="cannot be cut into rows of 4"):
            cut_rows(wrong, 4)


# The command.


@pytest.fixture
def command(tmp_path):
    generator = torch.Generator().manual_seed(0)
    words = SENTENCE.split()
    texts = [" ".join(words[i] for i in torch.randint(15, (30,), generator=generator).tolist()) for _ in range(40)]
    tokenizer = train_bpe_tokenizer(texts[:20], 270)
    teacher = teacher_of(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    for part in (tokenizer, teacher):
        part.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    text = str(tmp_path / "text.txt")
    words = ["distill", "--to", "hedgehog", "--teacher", str(tmp_path / "teacher"), "--data", text, "--window", "4"]
    words += [
        "--validation-data",
        text,
        "--block-length",
        "16",
        "--steps",
        "8",
        "--batch-size",
        "4",
        "--eval-rows",
        "4",
    ]
    return [*words, "--save-every", "2", "--log-every", "3", "--cpu", "--quiet"]


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does."""


def test_a_killed_run_resumes_to_the_same_curve_and_weights(command, tmp_path, monkeypatch, capsys):
    """All three stages, a choice by KL, killed in the second stage between two checkpoints and two lines of the log."""
    words = [*command, "--softmax-layers", "auto:30%", "--transfer-share", "0.4", "--long-share", "0.25"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*words, "--output", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "end of the attention transfer, step 3" in printed
    assert "when a layer alone is linear" in printed

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_begin", on_step_begin)
        with pytest.raises(Killed):
            main([*words, "--output", str(parts)])
    assert not (parts / REPORT_FILE).exists()
    assert main(["distill", "--resume", "--output", str(parts)]) == 0
    ours, theirs = (json.loads((folder / REPORT_FILE).read_text()) for folder in (parts, whole))
    for name in ("log", "before", "after", "steps", "layers_after_transfer", "layers_after", "softmax_choice"):
        assert ours[name] == theirs[name], name
    assert [entry["step"] for entry in theirs["log"]] == [1, 3, 6]
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert len(theirs["softmax_layers"]) == 1
    assert theirs["tokens"] == 8 * 4 * 16
    state = theirs["state"]
    grown = (131072 - 2048) * 2 * 2 * 4 * 4 / 1024  # keys and values of the one softmax layer
    assert state["131072"]["student_kib"] - state["2048"]["student_kib"] == pytest.approx(grown, abs=0.1)
    assert state["131072"]["teacher_kib"] == pytest.approx(3 * 131072 * 2 * 2 * 4 * 4 / 1024)
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert type(model).__name__ == "HedgehogForCausalLM"
    assert model.config.use_cache
    card = str(build_card(whole, speed=False))
    ratio = theirs["after"]["perplexity"] / theirs["after"]["teacher_perplexity"]
    assert "Learned from 512 tokens of text.txt." in card
    assert (
        f"is {ratio:.3f} times the teacher's. Layers that keep softmax attention: {theirs['softmax_layers'][0]}."
        in card
    )
    assert "KiB after 131,072 tokens, where the teacher's cache has 24,576" in card


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a name that Transformers has renamed
def test_adapters_train_and_merge(command, tmp_path):
    pytest.importorskip("peft")
    assert main([*command, "--lora", "2", "--steps", "4", "--output", str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not [name for name in model.state_dict() if "lora" in name or "modules_to_save" in name]
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").state_dict()
    name = "embed_tokens.weight"
    assert torch.equal(model.state_dict()[f"model.host.{name}"], teacher[f"model.{name}"])
    core = model.hedgehog_layers()[0]
    assert not torch.equal(core.query_map, torch.eye(4).expand_as(core.query_map))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 3}, "k belongs to --to sea"),
        ({"to": "sea", "window": 8}, "window belongs to --to hedgehog"),
        ({"window": 0}, "window must be at least 1"),
        ({"task": "classification", "data": ["x"]}, "as a causal language model"),
        ({"softmax_layers": ["auto:120%"]}, "a share from 0 to below 100%"),
        ({"softmax_layers": ["auto:25%", 1]}, "softmax_layers takes numbers"),
        ({"to": "sea", "softmax_layers": ["auto:25%"]}, "softmax_layers takes numbers"),
        ({"transfer_share": 0.7, "long_share": 0.5}, "together more than 1"),
        ({"transfer_share": 1.5}, "transfer_share must be at least 0 and at most 1"),
        ({"logits_weight": 0.0}, "nothing to learn"),
        ({"long_length": 1024}, "long_length belongs to long_share"),
        ({"long_share": 0.1, "long_length": 1000}, "must divide the longest rows"),
        ({"long_share": 0.1, "batch_size": 6}, "take a multiple of 4"),
        ({"minutes": 0.0}, "minutes must be greater than 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(given, message):
    with pytest.raises(ValueError, match=message):
        DistillOptions(**{"to": "hedgehog", "teacher": "x"} | given)


def test_options_of_each_family_have_their_own_defaults():
    ours, theirs = (DistillOptions(to=family, teacher="x") for family in ("hedgehog", "sea"))
    assert (ours.learning_rate, ours.logits_weight, ours.window, ours.k) == (1e-4, 1.0, 64, None)
    assert (theirs.learning_rate, theirs.logits_weight, theirs.window, theirs.k) == (1e-5, 0.1, None, 64)
    assert DistillOptions(to="hedgehog", teacher="x", minutes=3.0).steps > 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transfer_share": -0.1}, "transfer_share must be from 0 to 1"),
        ({"transfer_share": 0.6, "long_share": 0.6}, "together more than 1"),
        ({"feature_learning_rate": 0.0}, "feature_learning_rate must be greater"),
        ({"task_weight": float("nan")}, "task_weight must not be negative"),
        ({"logits_weight": 0.0}, "nothing to learn"),
        ({"minutes": -1.0}, "minutes must be greater"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        HedgehogDistillationArguments(str(tmp_path), **arguments)


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    student = linearize(teacher_of(), "hedgehog", window=4)
    for teacher, message in (
        (teacher_of(num_hidden_layers=2), "the teacher has num_hidden_layers=2 and the student 3"),
        (LlamaForSequenceClassification(LlamaConfig(**SIZES)), "expected a causal language model"),
        (student.model.host, "the student's own host"),
        ("llama", "`teacher` is a str"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, student=student, teacher=teacher)
    with pytest.raises(ValueError, match="holds no Hedgehog language model"):
        make_trainer(tmp_path, student=teacher_of())
    trainer, ids = make_trainer(tmp_path, student=student), Rows(2).ids
    with pytest.raises(ValueError, match="expected `input_ids`, `labels` and at most"):
        trainer.compute_loss(trainer.model, {"input_ids": ids, "position_ids": ids})
