"""Training: Trainer with its options, gradients in every precision, checkpoints on disk, adapters."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from common.batches import tokens
from common.families import (
    CAUSAL,
    FIRST,
    HYBRIDS,
    KINDS,
    NUMBERS,
    ROWS,
    VOCAB,
    all_rows,
    causal_rows,
    first_rows,
    rows_and,
    rows_with_heads,
)
from common.tasks import RATE, every_task, task_batch, tasks_of, trainer_for, without_targets
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

pytestmark = pytest.mark.long


class Texts(Dataset):
    """Eight texts, the same each time."""

    def __init__(self, length: int = 12):
        self.ids = tokens(8, length)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class Losses(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Remember a training loss."""
        if "loss" in logs:
            self.values.append(logs["loss"])


def train(model, folder, **options) -> list[float]:
    """The losses of a short training."""
    losses = Losses()
    defaults = {
        "max_steps": 16,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts(), callbacks=[losses])
    trainer.train()
    return losses.values


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"bf16": True}, id="bf16", marks=pytest.mark.slow),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation", marks=pytest.mark.slow),
        pytest.param(
            {"bf16": True, "gradient_accumulation_steps": 2, "activation_checkpointing": True}, id="all-together"
        ),
    ],
)
@pytest.mark.parametrize(
    "row", [row for row in ROWS if row in FIRST or row.name == "danet-encoder"], ids=lambda row: row.name
)
def test_trainer_lowers_the_loss(row, options, tmp_path):
    if "activation_checkpointing" in options and not hasattr(TrainingArguments, "activation_checkpointing"):
        options = {**options, "gradient_checkpointing": options["activation_checkpointing"]}
        del options["activation_checkpointing"]
    losses = train(row.predictor(initializer_range=0.1).train(), tmp_path, **options)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


@first_rows
def test_accumulated_steps_are_steps_with_a_larger_batch(row, tmp_path):
    """The mean is over all tokens of the accumulated batches, so the same weights come out."""
    weights = []
    for options in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        model = row.causal_lm().train()
        train(model, tmp_path, max_steps=2, optim="sgd", learning_rate=0.1, **options)
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], weight, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@every_task
def test_trainer_sees_the_models_own_loss(row, head, tmp_path):
    """Also where it counts labels that are no targets: those of padding, a text's first word behind padding."""
    model = row.build(head, torch.float64)
    trainer = trainer_for(model, tmp_path)
    for layout in ("left", "right", "inside"):
        batch = task_batch(head, layout)
        _, count = trainer.get_batch_samples(iter([batch]), 1, model.device)
        with torch.no_grad():
            found = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
            torch.testing.assert_close(found, model(**batch).loss, atol=1e-12, rtol=1e-12)


@tasks_of("leap", "danet-encoder", "sea", "sea-encoder")
def test_accumulated_rows_are_one_batch(row, head, tmp_path):
    """Four rows with unlike numbers of targets, one at a time: the loss that Trainer logs and the weights after the step."""
    model, batch = row.build(head, torch.float64), task_batch(head)
    if head == "AutoModelForCausalLM":  # no labels but targets, as collators make them: then Trainer's count is exact
        targets = (batch["attention_mask"] == 1) & (batch["attention_mask"].cumsum(1) > 1)
        batch["labels"] = batch["labels"].where(targets, -100)
    for module in model.modules():  # hosts' heads have some of their own
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    wanted = model(**batch).loss
    wanted.backward()
    weights = {n: p.detach() - RATE * p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainer = trainer_for(model, tmp_path, batch, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in weights:
            torch.testing.assert_close(parameter.detach(), weights[name], atol=1e-11, rtol=1e-11)


@tasks_of("leap", "sea")
def test_a_loss_function_of_ones_own(row, head, tmp_path):
    """It need not know of Trainer's count: the part of a batch is taken of what it returns."""
    model, batch = row.build(head, torch.float64), task_batch(head)
    trainer, original = trainer_for(model, tmp_path), model.loss_function
    model.loss_function = lambda *args, **kwargs: 3 * original(*args, **kwargs)
    _, count = trainer.get_batch_samples(iter([batch, batch]), 2, model.device)
    with torch.no_grad():
        wanted = 3 * row.build(head, torch.float64)(**batch).loss
        found = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    assert float(found) == pytest.approx(float(wanted if count is None else wanted / 2), rel=1e-6)


@every_task
def test_a_batch_that_teaches_nothing(row, head):
    """Loss and gradients are 0, not NaN, whatever Trainer counts."""
    model, batch = row.build(head).train(), without_targets(task_batch(head))
    for count in (None, 0, torch.tensor(0)):
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        assert loss == 0
        assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@first_rows
def test_label_smoothing_looks_at_the_next_token(row, tmp_path):
    """Trainer shifts labels only for classes whose name it knows; the loss is computed here by hand."""
    model = row.causal_lm()
    ids = tokens(2, 9)
    arguments = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
    assert isinstance(trainer.label_smoother, LabelSmoother)
    with torch.no_grad():
        found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    by_hand = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-5)


@causal_rows
def test_loss_is_the_mean_over_next_tokens(row):
    model = row.causal_lm(torch.float64)
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, 2] = labels[1, 5:7] = -100
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        output = model.to(dtype)(ids, labels=labels)
        by_hand = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(output.loss, by_hand, atol=tolerance, rtol=tolerance)


def parameter_gradients(model, **arguments) -> dict[str, torch.Tensor]:
    model.zero_grad()
    classes = VOCAB if model.get_output_embeddings() is not None else model.config.num_labels
    model(tokens(2, 20), labels=tokens(2, 20) % classes, **arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@rows_and(
    "reentrant", {"True": True, "False": False}, NUMBERS, lambda row, reentrant: row in KINDS or reentrant == "False"
)
def test_checkpointing_gives_the_same_gradients(row, reentrant):
    model = row.predictor(torch.float64, hidden_dropout_prob=0.1).train()
    plain = seeded_gradients(model)
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    else:
        enable({"use_reentrant": reentrant})
    again = seeded_gradients(model)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-12, rtol=1e-9)


def seeded_gradients(model):
    torch.manual_seed(0)
    return parameter_gradients(model)


@causal_rows
def test_every_parameter_gets_a_gradient(row):
    found = parameter_gradients(row.causal_lm().train())
    names = dict(row.causal_lm().named_parameters())
    assert {name for name, gradient in found.items() if gradient.abs().max() > 0} == set(names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["autocast", "weights"])
@all_rows
def test_half_precision_is_finite_and_close(row, way, dtype):
    """Forward and backward in half precision, on texts long enough for naive sums to lose it."""
    exact = row.build("AutoModelForCausalLM" if row.causal else "AutoModelForTokenClassification")
    model = copy.deepcopy(exact).to(dtype if way == "weights" else torch.float32)
    ids = tokens(2, 200)
    with torch.autocast("cpu", dtype, enabled=way == "autocast"):
        found = model(ids)[0]
    with torch.no_grad():
        wanted = exact(ids)[0]
    assert found.isfinite().all()
    if not row.sharp:
        error = (found.float() - wanted).norm() / wanted.norm()
        # three layers, each rounding several times to 8 (bfloat16) or 11 bits
        assert error < (0.1 if dtype == torch.bfloat16 else 0.02)
    found.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@causal_rows
def test_gradcheck(row):
    """Analytic gradients against differences, through the whole model."""
    model = row.causal_lm(torch.float64, hidden_size=8, num_hidden_layers=3)
    embeds = model.get_input_embeddings()(tokens(1, 6)).detach().requires_grad_()
    mask = torch.tensor([[0, 1, 1, 0, 1, 1]])

    def logits(x):
        return model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits[mask.bool()].tanh()

    assert torch.autograd.gradcheck(logits, embeds, fast_mode=True)


@causal_rows
def test_gradients_through_a_state(row):
    """Training on a text in two calls, with gradients through the state, is training on it in one."""
    model = row.causal_lm(torch.float64)
    ids = tokens(2, 20)
    model(ids, use_cache=False).logits.square().sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    first = model(ids[:, :11], use_cache=True)
    second = model(ids[:, 11:], cache=first.cache)
    (first.logits.square().sum() + second.logits.square().sum()).backward()
    for name, parameter in model.named_parameters():
        scale = whole[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-10 * max(1, scale), rtol=1e-8)


def fields(config) -> dict:
    """What describes the model, without where it and its code lie (a checkpoint names the code it carries)."""
    return config.to_dict() | {"_name_or_path": None, "dtype": None, "auto_map": None}


@rows_with_heads
def test_saved_and_loaded(row, head, tmp_path):
    """Through the Auto classes, to the bit."""
    model = row.build(head)
    model.save_pretrained(tmp_path)
    loaded, report = getattr(transformers, head).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(report.values()), report
    assert fields(loaded.config) == fields(model.config)
    with torch.no_grad():
        assert torch.equal(loaded(tokens(2, 9))[0], model(tokens(2, 9))[0])
    if model.get_output_embeddings() is not None:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@all_rows
def test_config_on_disk(row, tmp_path):
    config = row.config()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert fields(loaded) == fields(config)


@causal_rows
def test_a_body_loads_into_a_language_model_and_back(row, tmp_path):
    model = row.causal_lm()
    model.save_pretrained(tmp_path / "lm")
    body = AutoModel.from_pretrained(tmp_path / "lm")
    body.save_pretrained(tmp_path / "body")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    with torch.no_grad():
        assert torch.equal(again.model(tokens(2, 9))[0], model.model(tokens(2, 9))[0])


@causal_rows
def test_resized_vocabulary(row):
    model = row.causal_lm()
    model.resize_token_embeddings(VOCAB + 5)
    assert model.config.vocab_size == model.config.get_text_config().vocab_size == VOCAB + 5
    assert model(tokens(1, 4)).logits.shape[-1] == VOCAB + 5
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("row", [*CAUSAL, HYBRIDS[0]], ids=lambda row: row.name)
def test_lora_on_all_linear_layers(row):
    """Every adapter gets a gradient, generation works, and merging changes nothing."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        row.causal_lm(torch.float64), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # starts at zero, which would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    adapters = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    plain = row.causal_lm()
    linear = [m for m in plain.modules() if isinstance(m, torch.nn.Linear) and m is not plain.get_output_embeddings()]
    assert len(adapters) == 2 * len(linear)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.values())
    wrapped.eval()
    with torch.no_grad():
        logits = wrapped(tokens(2, 9)).logits
        text = wrapped.generate(tokens(1, 4), max_new_tokens=4)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(tokens(2, 9)).logits, logits, atol=1e-9, rtol=0)
        assert torch.equal(merged.generate(tokens(1, 4), max_new_tokens=4), text)


@pytest.mark.parametrize("row", [*CAUSAL, HYBRIDS[0]], ids=lambda row: row.name)
def test_lora_finds_targets_by_itself(row):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(row.causal_lm(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    targeted = {n for n, m in wrapped.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
    assert len(targeted) >= row.config().num_hidden_layers
    assert all(row.mixer in name for name in targeted)


@first_rows
def test_prompt_tuning(row):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(row.causal_lm(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    wrapped(tokens(2, 9), attention_mask=torch.ones(2, 9, dtype=torch.long), labels=tokens(2, 9)).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in wrapped.parameters() if p.requires_grad)
    assert wrapped.generate(input_ids=tokens(1, 4), max_new_tokens=4).shape[1] >= 4


@first_rows
def test_prefix_tuning_is_refused(row):
    """It injects keys and values, which a recurrent state has no place for."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(row.causal_lm(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises((ValueError, NotImplementedError), match=r"keys and values|does not belong"):
        wrapped(tokens(2, 9))


@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning])
@pytest.mark.parametrize("module", ["transformers.trainer", "transformers", "hf_linear_attn.modeling.shared.causal_lm"])
def test_deprecations_of_transformers_are_errors(category, module):
    """The filters in pyproject.toml act on every module of the packages, not only on the top one."""
    with pytest.raises(category):
        warnings.warn_explicit("soon gone", category, "file.py", 1, module=module)


@pytest.mark.parametrize("length", [9, 70])
@first_rows
def test_gradients_of_single_samples_at_once(row, length):
    """`torch.func` with vmap, as differential privacy and influence functions need it; padding differs between the samples."""
    if row.family == "sea":
        pytest.skip("the keys that SEA selects are read from values, which vmap does not show")
    model = row.causal_lm(**row.layers(2))
    ids, mask = tokens(3, length), torch.ones(3, length, dtype=torch.long)
    mask[0, :4] = mask[1, 5:] = 0

    def loss(parameters, ids, mask):
        arguments = {"input_ids": ids[None], "attention_mask": mask[None], "labels": ids[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, kwargs=arguments).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(dict(model.named_parameters()), ids, mask)
    for i in range(3):
        model.zero_grad()
        model(ids[i : i + 1], attention_mask=mask[i : i + 1], labels=ids[i : i + 1]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, atol=1e-5, rtol=1e-3)
