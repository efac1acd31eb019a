import copy

import pytest
import torch
import transformers

from hf_linear_attn.conversion import linearize
from hf_linear_attn.modeling.sea.losses import TeacherTargets
from hf_linear_attn.training import sea_distillation
from hf_linear_attn.training.sea_distillation import (
    SeaDistillationArguments,
    SeaDistillationTrainer,
    add_lora,
    prediction_divergence,
    record_targets,
)

from .hosts import make_ids, make_student, make_teacher
from .test_linear_memory import LargestTensors

pytestmark = pytest.mark.long

TASKS = {"bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM", "gpt2": None, "opt": None}


class Rows(torch.utils.data.Dataset):
    """Random texts with labels for the task."""

    def __init__(self, host: str, count: int = 16, length: int = 18):
        self.ids, self.classify = make_ids(count, length, seed=3), host == "bert"

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = self.ids[i].sum() % 2 if self.classify else self.ids[i]
        mask = (torch.arange(len(self.ids[i])) < 18 - i % 4).long()
        return {"input_ids": self.ids[i], "attention_mask": mask, "labels": labels}


def make_trainer(host, tmp_path, student=None, teacher=None, **arguments):
    teacher = teacher or make_teacher(host, TASKS[host])
    student = student or linearize(teacher, "sea", k=3, predictor_length=16)
    options = {
        "output_dir": str(tmp_path),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 2,
        "save_strategy": "no",
    }
    return SeaDistillationTrainer(
        student,
        teacher,
        SeaDistillationArguments(**(options | arguments)),
        train_dataset=Rows(host),
        eval_dataset=Rows(host, 8),
    )


def test_a_student_that_cannot_be_saved_is_not_trained(tmp_path):
    trainer = make_trainer("llama", tmp_path)
    trainer.model.generation_config.temperature = 0.5
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match="generation_config` could not be saved"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    teacher = make_teacher("llama")
    teacher.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match=r"(?s)could not be saved.*do_sample"):
        linearize(teacher, "sea", k=3, predictor_length=16)


@pytest.mark.parametrize("host", TASKS)
def test_recorded_targets_are_what_the_teacher_does(host):
    teacher = make_teacher(host, TASKS[host])
    ids, mask = make_ids(3, 16), torch.ones(3, 16, dtype=torch.long)
    mask[0, :5] = mask[1, 12:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    targets, output = record_targets(teacher, {"input_ids": ids, "attention_mask": mask})
    assert teacher.config._attn_implementation != "hf_linear_attn_sea"
    teacher.set_attn_implementation("eager")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = teacher(
        ids, attention_mask=mask, position_ids=positions, output_attentions=True, output_hidden_states=True
    )
    for layer, attention in enumerate(expected.attentions):
        scores = targets[layer].rows(torch.arange(16))
        seen = mask[:, None, None].bool()
        if host != "bert":
            seen = seen & torch.ones(16, 16, dtype=torch.bool).tril()
        probs = scores.masked_fill(~seen, -1e30).softmax(-1)
        real = mask.bool()[:, None].expand(-1, probs.shape[1], -1)
        torch.testing.assert_close(probs[real], attention[real], atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(output.hidden_states, expected.hidden_states):
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("host", ["bert", "llama"])
def test_the_teachers_loss_is_over_the_students_targets(host, tmp_path):
    """A student that is its teacher has its loss, with labels under the padding and rows without any target."""
    teacher = make_teacher(host, TASKS[host])
    student = linearize(teacher, "sea", k=3, predictor_length=16, softmax_layers=[0, 1])
    trainer = make_trainer(host, tmp_path, student, teacher, per_device_eval_batch_size=1)
    rows = [trainer.eval_dataset[i] for i in range(3)]
    rows[1]["labels"] = torch.full_like(rows[1]["labels"], -100)
    found = trainer.evaluate(rows)
    assert found["eval_teacher_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert found["eval_loss"] > 0.1


@pytest.mark.parametrize("host", ["bert", "llama"])
def test_distillation_brings_the_student_to_the_teacher(host, tmp_path):
    rates = {"learning_rate": 1e-3, "sea_learning_rate": 2e-2, "attention_weight": 10.0}
    trainer = make_trainer(host, tmp_path, max_steps=60, logging_steps=20, eval_strategy="no", **rates)
    before = trainer.evaluate()
    weights = copy.deepcopy(trainer.teacher.state_dict())
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_distillation_loss"] < 0.7 * before["eval_distillation_loss"]
    assert after["eval_estimate_kl"] < after["eval_uniform_kl"]
    assert after["eval_top_k_recall"] > before["eval_top_k_recall"]
    assert 0 < after["eval_attention_mass"] <= 1
    assert 1 <= after["eval_keys_per_query"] <= 18
    assert after["eval_teacher_loss"] == pytest.approx(before["eval_teacher_loss"])
    assert after["eval_loss"] != before["eval_loss"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"task_loss", "hidden_loss", "logits_loss", "attention_loss"} <= set(logged[0])
    total = sum(logged[0][name] for name in ("task_loss", "hidden_loss", "logits_loss", "attention_loss"))
    assert total == pytest.approx(logged[0]["loss"], rel=1e-3)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.teacher.state_dict().items())


def trained_weights(trainer, **arguments):
    trainer.train(**arguments)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal_weights(ours, theirs, **tolerance):
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


def test_accumulated_batches_equal_a_large_batch(tmp_path):
    whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    grads = []
    for options in (whole, parts):
        # without padding every mean over a batch is the mean of the means over its parts
        trainer = make_trainer(
            "bert", tmp_path, max_steps=1, learning_rate=0.1, sea_learning_rate=0.1, optim="sgd", **options
        )
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train_dataset.ids = trainer.train_dataset.ids[:, :15]
        grads.append(trained_weights(trainer))
    assert_equal_weights(grads[1], grads[0], atol=1e-5, rtol=1e-4)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "attention_loss_rows": 6, "sea_learning_rate": 1e-3}

    def trainer(folder):
        student = linearize(make_teacher("llama"), "sea", k=3, predictor_length=16, feature_redraw_interval=2)
        return make_trainer("llama", folder, student=student, **options)

    torch.manual_seed(0)
    unbroken = trained_weights(trainer(tmp_path / "a"))
    torch.manual_seed(0)
    resumed = trainer(tmp_path / "b")
    resumed = trained_weights(resumed, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_equal_weights(resumed, unbroken, atol=1e-6, rtol=1e-5)


def test_features_are_redrawn_at_their_interval(tmp_path):
    student = make_student("llama", feature_redraw_interval=4)
    before = [core.random_features.clone() for core in student.sea_layers().values()]
    make_trainer("llama", tmp_path, student=student, max_steps=3).train()
    assert all(torch.equal(a, c.random_features) for a, c in zip(before, student.sea_layers().values()))
    make_trainer("llama", tmp_path, student=student, max_steps=4).train()
    assert not any(torch.equal(a, c.random_features) for a, c in zip(before, student.sea_layers().values()))


def test_sea_has_its_own_learning_rate(tmp_path):
    trainer = make_trainer("bert", tmp_path, learning_rate=1e-5, sea_learning_rate=2e-4)
    groups = trainer.create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert rates[id(parameter)] == (2e-4 if ".sea." in name else 1e-5)
        assert decay[id(parameter)] == (0.0 if "bias" in name or "norm" in name.lower() else 0.01)


def test_the_host_can_stay_frozen(tmp_path):
    trainer = make_trainer("llama", tmp_path, train_host=False, sea_learning_rate=1e-2)
    before = copy.deepcopy(trainer.model.state_dict())
    after = trained_weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".sea." in name for name in changed)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a name that Transformers has renamed
@pytest.mark.parametrize("host", ["bert", "gpt2"])
def test_lora_trains_adapters_and_sea_and_merges(host, tmp_path):
    pytest.importorskip("peft")
    student = make_student(host, TASKS[host])
    model = add_lora(student, rank=2)
    trainer = make_trainer(host, tmp_path, student=model, train_host=False, learning_rate=1e-2, sea_learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert any("lora_" in name for name in changed)
    assert any("scaler" in name for name in changed)
    assert all("lora_" in name or ".sea." in name for name in changed)
    ids = make_ids()
    expected = model.eval()(input_ids=ids).logits
    merged = model.merge_and_unload().eval()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=1e-3)


def test_bfloat16_and_checkpointing_train(tmp_path):
    names = SeaDistillationArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    trainer = make_trainer("llama", tmp_path, bf16=True, max_steps=2, **{name: True})
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert trainer.state.log_history[0]["loss"] > 0


def test_divergence_counts_real_tokens_only():
    ours, theirs = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    rows = [(ours[b, t], theirs[b, t]) for b in range(2) for t in range(5) if mask[b, t]]
    expected = sum((y.softmax(-1) * (y.log_softmax(-1) - x.log_softmax(-1))).sum() for x, y in rows) / 8
    torch.testing.assert_close(prediction_divergence(ours, theirs, mask), expected)
    torch.testing.assert_close(prediction_divergence(ours[:, 0], theirs[:, 0], mask[:, :3]) > 0, torch.tensor(True))


def test_a_large_vocabulary_is_compared_in_blocks(monkeypatch):
    """Values and gradients do not depend on the blocks; beside the gradient, no tensor is as large as the predictions."""
    theirs, results, made = torch.randn(2, 30, 50), [], []
    for elements in (1 << 24, 4 * 50):
        monkeypatch.setattr(sea_distillation, "BLOCK_ELEMENTS", elements)
        ours = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with LargestTensors(10**9) as seen:
            loss = prediction_divergence(ours, theirs, None)
        made.append(seen.made)
        loss.backward()
        results.append((loss.detach(), ours.grad))
    torch.testing.assert_close(results[0], results[1])
    assert made[0] >= theirs.numel()
    assert made[1] <= 4 * 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_weight": -1}, "hidden_weight must not be negative"),
        (dict.fromkeys(["task_weight", "hidden_weight", "logits_weight", "attention_weight"], 0), "nothing to learn"),
        ({"hidden_weight": float("nan")}, "hidden_weight must not be negative"),
        ({"attention_loss_rows": 0}, "attention_loss_rows must be at least 1"),
        ({"sea_learning_rate": 0.0}, "sea_learning_rate must be greater"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SeaDistillationArguments(str(tmp_path), **arguments)


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    student = make_student("llama")
    with pytest.raises(ValueError, match="load the teacher a second time"):
        make_trainer("llama", tmp_path, student=student, teacher=student.host)
    with pytest.raises(ValueError, match="the teacher has num_hidden_layers=3 and the student 2"):
        make_trainer("llama", tmp_path, student=student, teacher=make_teacher("llama", num_hidden_layers=3))
    with pytest.raises(ValueError, match="`teacher` is a str"):
        make_trainer("llama", tmp_path, student=student, teacher="llama")
    other = transformers.LlamaForSequenceClassification(make_teacher("llama").config)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification and the student's host a LlamaForCausalLM"):
        make_trainer("llama", tmp_path, student=student, teacher=other)
    with pytest.raises(ValueError, match="holds no SEA model"):
        make_trainer("llama", tmp_path, student=make_teacher("llama"))
    with pytest.raises(ValueError, match="has shape"):
        TeacherTargets(scores=torch.zeros(1, 2, 3, 3)).check(1, 2, 4, 8)
    for key in (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 5), torch.zeros(1, 3, 4, 4)):
        with pytest.raises(ValueError, match="the teacher's `k` has shape"):
            TeacherTargets(q=torch.zeros(1, 2, 4, 4), k=key).check(1, 2, 4, 8)
