"""What else a Transformers user expects, checked on every model in the same way, beside the 31 checks."""

import copy
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from .inference import greedy_text
from .models import VOCAB, Subject
from .probes import close, logits_of, step, tokens


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<mask>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", mask_token="<mask>", unk_token="w2", padding_side="left"
    )


TEXTS = ["w5 w9 w12", "w7", "w30 w31 w32 w33 w34 w35"]


def _head(subject: Subject, task: str):
    transformers.set_seed(0)
    config = subject.build().config
    return (
        getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
        .from_config(config)
        .to(subject.device)
        .eval()
    )


def sharded(subject: Subject) -> None:
    """Several safetensors shards"""
    model, ids = subject.build(), tokens(subject, 2, 12)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="8KB")
        assert len(list(Path(folder).glob("*.safetensors"))) > 1
        loaded = type(model).from_pretrained(folder).to(subject.device).eval()
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


def prompt_lookup(subject: Subject) -> None:
    """Prompt lookup decoding gives greedy's tokens"""
    model, ids = subject.build(), tokens(subject, 1, 6).repeat(1, 3)
    expected = greedy_text(subject, model, ids)
    assert torch.equal(greedy_text(subject, model, ids, prompt_lookup_num_tokens=3), expected), "other tokens"


def forked_state(subject: Subject) -> None:
    """Forking a conversation's state"""
    model, ids = subject.build(), tokens(subject, 1, 20)
    _, cache = step(model, ids[:, :12])
    other = copy.deepcopy(cache)
    step(model, tokens(subject, 1, 5, seed=3), other)
    found, _ = step(model, ids[:, 12:], cache)
    close(subject, found, logits_of(model, ids)[:, 12:])


def saved_state(subject: Subject) -> None:
    """Saving and loading a conversation's state"""
    model, ids = subject.build(), tokens(subject, 1, 20)
    _, cache = step(model, ids[:, :12])
    with tempfile.TemporaryDirectory() as folder:
        if not hasattr(cache, "save"):
            raise NotImplementedError(f"{type(cache).__name__} has no method to save it")
        cache.save(Path(folder) / "state.safetensors")
        cache = type(cache).load(Path(folder) / "state.safetensors", model.config)
    found, _ = step(model, ids[:, 12:], cache)
    close(subject, found, logits_of(model, ids)[:, 12:])


def lora_merged(subject: Subject) -> None:
    """LoRA merged into the weights computes the same"""
    from peft import LoraConfig, get_peft_model

    model, ids = get_peft_model(subject.build(), LoraConfig(r=2, target_modules="all-linear")), tokens(subject, 2, 12)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    close(subject, logits_of(model.merge_and_unload(), ids), expected)


def prompt_tuning(subject: Subject) -> None:
    """Prompt tuning trains and generates"""
    from peft import PromptTuningConfig, get_peft_model

    base = subject.build()
    sizes = {
        "token_dim": base.config.hidden_size,
        "num_layers": base.config.num_hidden_layers,
        "num_attention_heads": 2,
    }
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes))
    ids = tokens(subject, 2, 12)
    mask = torch.ones_like(ids)
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, pad_token_id=0)


def prefix_tuning(subject: Subject) -> None:
    """Prefix tuning"""
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=32, num_attention_heads=2
    )
    ids = tokens(subject, 2, 12)
    get_peft_model(subject.build(), config)(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids
    ).loss.backward()


def int8(subject: Subject) -> None:
    """8-bit loading through torchao"""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model, ids = subject.build(), tokens(subject, 2, 12)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        small = type(model).from_pretrained(
            folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
        )
    kinds = {type(p).__name__ for p in small.parameters()}
    assert any("Int8" in kind or "Quantized" in kind for kind in kinds), "no weight was quantized"
    exact = logits_of(model, ids)
    assert (logits_of(small, ids) - exact).norm() < 0.1 * exact.norm()


def _batched(subject: Subject, pipe, **options) -> None:
    together = pipe(TEXTS, batch_size=3, **options)
    for text, found in zip(TEXTS, together, strict=True):
        alone = pipe(text, **options)
        _same(found, alone[0] if isinstance(found, dict) else alone)  # a list, for some tasks, even of one text


def _same(found, expected) -> None:
    """Equal words and labels; scores and features within 1e-4."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            _same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            _same(a, b)
    elif isinstance(expected, str):
        assert found == expected, "other words"
    else:
        assert abs(found - expected) < 1e-4, "other scores"


def pipeline_generation(subject: Subject) -> None:
    """Pipeline text-generation, batched as one by one"""
    _batched(
        subject,
        pipeline("text-generation", model=subject.build(), tokenizer=_tokenizer()),
        max_new_tokens=4,
        do_sample=False,
    )


def pipeline_fill_mask(subject: Subject) -> None:
    """Pipeline fill-mask"""
    model = _head(subject, "MaskedLM")
    found = pipeline("fill-mask", model=model, tokenizer=_tokenizer())("w5 <mask> w9")
    assert len(found) == 5


def pipeline_text_classes(subject: Subject) -> None:
    """Pipeline text-classification, batched as one by one"""
    model = _head(subject, "SequenceClassification")
    _batched(subject, pipeline("text-classification", model=model, tokenizer=_tokenizer()))


def pipeline_token_classes(subject: Subject) -> None:
    """Pipeline token-classification"""
    pipe = pipeline("token-classification", model=_head(subject, "TokenClassification"), tokenizer=_tokenizer())
    assert [each["word"] for each in pipe(TEXTS[0], ignore_labels=[])] == TEXTS[0].split()


def pipeline_features(subject: Subject) -> None:
    """Pipeline feature-extraction"""
    body = _head(subject, "")
    found = torch.tensor(pipeline("feature-extraction", model=body, tokenizer=_tokenizer())(TEXTS[0]))
    assert found.shape[:2] == (1, 3)


def whole_blocks(subject: Subject) -> None:
    """Blocks that device maps, FSDP and DeepSpeed keep whole are named"""
    model = subject.build()
    named = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    assert len(named) >= model.config.num_hidden_layers, "a layer is in no such block"


CHECKS = (
    sharded,
    prompt_lookup,
    forked_state,
    saved_state,
    lora_merged,
    prompt_tuning,
    prefix_tuning,
    int8,
    pipeline_generation,
    pipeline_fill_mask,
    pipeline_text_classes,
    pipeline_token_classes,
    pipeline_features,
    whole_blocks,
)
