"""Checks of saving, training, adapters, compiling, exporting and of the interface. Each raises where it fails."""

import tempfile
from pathlib import Path

import torch
import transformers
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments

from .models import Subject
from .probes import cache_argument, close, logits_of, takes, tokens

# PEFT, Trainer and the compiler train copies of the model, never the one that others use: build() makes a new one each time.


def safetensors(subject: Subject) -> None:
    """Safetensors round trip"""
    model, ids = subject.build(), tokens(subject, 2, 12)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert list(Path(folder).glob("*.safetensors")), "no safetensors file"
        assert not list(Path(folder).glob("*.bin")), "a pickle file"
        loaded = type(model).from_pretrained(folder).to(subject.device).eval()
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids)), "other logits"


def trainer(subject: Subject) -> None:
    """Trainer lowers the loss"""
    row = tokens(subject, 1, 16)[0].cpu()
    rows = [{"input_ids": row, "labels": row} for _ in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_strategy="no",
            use_cpu=subject.device == "cpu", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        run = Trainer(subject.build().train(), arguments, train_dataset=rows)
        run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0], f"loss from {losses[0]:.2f} to {losses[-1]:.2f}"


def _lora(subject: Subject, **options) -> None:
    from peft import LoraConfig, get_peft_model

    if subject.causal:
        options["task_type"] = "CAUSAL_LM"
    model = get_peft_model(subject.build(), LoraConfig(r=2, **options))
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert adapters, "no adapters"
    for name, parameter in adapters.items():
        if "lora_B" in name:  # starts at zero, which would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    ids = tokens(subject, 2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    idle = [name for name, p in adapters.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle, f"{len(idle)} of {len(adapters)} adapter weights get no gradient, such as {idle[0]}"
    if subject.causal:
        text = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0
        )
        assert text.shape == (2, 16)


def lora_all_linear(subject: Subject) -> None:
    """LoRA with `all-linear`: every adapter gets a gradient, generate works"""
    _lora(subject, target_modules="all-linear")


def lora_default(subject: Subject) -> None:
    """LoRA with no targets named finds sensible ones"""
    _lora(subject)


def gradient_checkpointing(subject: Subject) -> None:
    """Gradient checkpointing gives the same gradients"""
    ids, found = tokens(subject, 2, 12), []
    for recompute in (False, True):
        model = subject.build().train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        transformers.set_seed(0)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        scale = max(1.0, gradient.abs().max().item())
        close(subject, found[1][name] / scale, gradient / scale)


def compiled_prefill(subject: Subject) -> None:
    """torch.compile fullgraph prefill"""
    torch._dynamo.reset()
    model, ids = subject.build(), tokens(subject, 2, 24)
    forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    close(subject, logits_of(_with_forward(model, forward), ids), logits_of(model, ids))


class _with_forward:
    """A model whose calls go to another function with the same arguments."""

    def __init__(self, model, forward):
        self.forward, self.model = model.forward, forward

    def __call__(self, **arguments):
        return self.model(**arguments)


def compiled_decode(subject: Subject) -> None:
    """Fullgraph decode without recompiling each step"""
    torch._dynamo.reset()
    model, ids = subject.build(), tokens(subject, 2, 18)
    try:
        cache = StaticCache(config=model.config, max_cache_len=32)
    except Exception:
        cache = DynamicCache(config=model.config)
    counter = CompileCounter()
    forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    expected = logits_of(model, ids)
    name = cache_argument(model)
    with torch.no_grad():
        model(input_ids=ids[:, :10], use_cache=True, **{name: cache})
        for place in range(10, 18):
            found = forward(input_ids=ids[:, place : place + 1], use_cache=True, **{name: cache}).logits
            close(subject, found[:, -1], expected[:, place])
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs in 8 steps"


class _Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        more = {"use_cache": False} if takes(self.model, "use_cache") else {}
        return self.model(input_ids=ids, attention_mask=mask, **more).logits


def _exported(subject: Subject, lengths: tuple[int, ...], shapes=None) -> None:
    torch._dynamo.reset()
    module = _Logits(subject.build())
    ids = tokens(subject, 2, lengths[0])
    with torch.no_grad():
        program = torch.export.export(module, (ids, torch.ones_like(ids)), dynamic_shapes=shapes, strict=False).module()
        for length in lengths:
            ids = tokens(subject, 2, length, seed=1)
            mask = torch.ones_like(ids)
            close(subject, program(ids, mask), module(ids, mask))


def exported_fixed(subject: Subject) -> None:
    """torch.export with fixed shapes"""
    _exported(subject, (24,))


def exported_dynamic(subject: Subject) -> None:
    """torch.export with dynamic length"""
    length = {1: torch.export.Dim("length", min=2, max=128)}
    _exported(subject, (24, 9, 100), {"ids": length, "mask": length})


def inputs_embeds(subject: Subject) -> None:
    """`inputs_embeds`"""
    model, ids = subject.build(), tokens(subject, 2, 12)
    with torch.no_grad():
        found = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    close(subject, found, logits_of(model, ids))


def logits_to_keep(subject: Subject) -> None:
    """`logits_to_keep`"""
    model, ids = subject.build(), tokens(subject, 2, 12)
    close(subject, logits_of(model, ids, logits_to_keep=3), logits_of(model, ids)[:, -3:])


def output_attentions(subject: Subject) -> None:
    """`output_attentions` gives one map per layer"""
    model, ids = subject.build(), tokens(subject, 2, 12)
    if not subject.ours:
        model.set_attn_implementation("eager")  # the fused ones of Transformers have no maps to give
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    assert maps is not None, "none is given"
    assert len(maps) == model.config.num_hidden_layers, f"{len(maps)} maps, {model.config.num_hidden_layers} layers"
    assert all(each is not None and each.shape[0] == 2 and each.shape[-2:] == (12, 12) for each in maps), "no maps"


def other_heads(subject: Subject) -> None:
    """The other Auto heads exist (sequence and token classification, question answering)"""
    config = subject.build().config
    for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        model = getattr(transformers, f"AutoModelFor{task}").from_config(config).to(subject.device).eval()
        with torch.no_grad():
            assert model(input_ids=tokens(subject, 2, 12))[0].isfinite().all()


CHECKS = (
    safetensors,
    trainer,
    lora_all_linear,
    lora_default,
    gradient_checkpointing,
    compiled_prefill,
    compiled_decode,
    exported_fixed,
    exported_dynamic,
    inputs_embeds,
    logits_to_keep,
    output_attentions,
    other_heads,
)
