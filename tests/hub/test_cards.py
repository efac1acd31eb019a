"""Model cards: what they say is what the model and the run are, and the Hub can read them."""

import json
import re

import pytest
import torch
from common.tiny import FAMILY_ROWS, every_head, one_row_a_family, some_ids
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from hf_linear_attn.cli.main import main
from hf_linear_attn.families import FAMILIES
from hf_linear_attn.hub import ModelCardCallback, build_card
from hf_linear_attn.modeling.shared.states.cache import RecurrentCache

REPORT = {
    "family": "leap", "parameters": 1, "text": "speeches: 1790 to 2026", "steps": 40, "training_tokens": 4000,
    "training_seconds": 12.3, "tokens_per_second": 325.0, "peak_memory_mb": 512.0, "machine": {"device": "x86_64"},
    "test": {"loss": 2.5, "perplexity": 12.18, "bits_per_byte": 1.25}, "validation": {"perplexity": 13.0},
    "curve": {"training": [{"step": s, "loss": 5.0 - s / 20} for s in range(1, 41)],
              "validation": [{"step": 20, "loss": 4.1}, {"step": 40, "loss": 3.25}]},
    "options": {"batch_size": 4, "learning_rate": 0.001},
}  # fmt: skip


def facts(card):
    """Rows of the card's tables, as key -> value."""
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", str(card), flags=re.M))


@every_head
def test_says_what_the_model_is(row, head, tmp_path):
    """Family, class, parameters and sizes; the right pipeline; the code on the card loads it."""
    model = row.build(head)
    model.save_pretrained(tmp_path / "small")
    card = build_card(tmp_path / "small", speed=False)
    found = facts(card)
    assert found["class"] == type(model).__name__
    assert found["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert found["width"] == str(model.config.hidden_size)
    assert f"{head}.from_pretrained" in str(card)
    assert card.data.library_name == "transformers"
    assert row.family in card.data.tags
    for section in ("How to load", "Training", "Results", "State and speed", "Limits", "Licence", "Citation"):
        assert f"\n## {section}\n" in str(card)


@one_row_a_family
def test_figures_of_the_run(row, tmp_path):
    """Scores go into text and metadata, the curve into a table; nothing is invented where nothing is known."""
    row.build("AutoModel").save_pretrained(tmp_path)
    (tmp_path / "training_report.json").write_text(json.dumps(REPORT))
    card = build_card(tmp_path, repo="user/small", language="en", license="mit", speed=False)
    assert "| test | Perplexity | 12.18 |" in str(card)
    assert "| 40 | 3.000 | 3.250 |" in str(card)
    # A training loss that is logged less often than the validation loss is not shown again as if it were a new one.
    curve = {"training": [{"step": 1, "loss": 5.0}], "validation": [{"step": s, "loss": 4.0} for s in (10, 20)]}
    (tmp_path / "training_report.json").write_text(json.dumps(REPORT | {"curve": curve}))
    rows = str(build_card(tmp_path, speed=False))
    assert "| 10 | 5.000 | 4.000 |\n| 20 | - | 4.000 |" in rows
    assert "40 steps, 4,000 tokens in 12 s" in str(card)
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results == {
        ("test", "loss"): 2.5, ("test", "perplexity"): 12.18, ("test", "bits_per_byte"): 1.25,
        ("validation", "perplexity"): 13.0,
    }  # fmt: skip
    (tmp_path / "training_report.json").unlink()
    bare = str(build_card(tmp_path, speed=False))
    assert "Nothing is recorded" in bare
    assert "No results are recorded" in bare


@one_row_a_family
def test_metadata_is_read_back(row, tmp_path):
    """The file's metadata survives reading and writing, as the Hub does it."""
    row.build("AutoModel").save_pretrained(tmp_path)
    (tmp_path / "training_report.json").write_text(json.dumps(REPORT))
    card = build_card(tmp_path, language="en", license="mit", dataset="user/speeches", speed=False)
    card.save(tmp_path / "README.md")
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == card.data.to_dict()
    assert again.data.license == "mit"
    assert again.data.datasets == ["user/speeches"]
    assert len(again.data.eval_results) == 4


def test_state_and_speed_are_measured():
    """The bytes on the card are those of a cache, equal at both lengths; speeds are positive numbers."""
    row = next(row for row in FAMILY_ROWS if row.causal)
    model = row.causal_lm()
    found = facts(build_card(model))
    cache = RecurrentCache(config=model.config)
    with torch.no_grad():
        model(some_ids(), cache=cache, use_cache=True)
    sizes = [int(v.replace(",", "")) for k, v in found.items() if k.startswith("state after")]
    assert sizes == [cache.state_size()] * 2
    speeds = [int(v.replace(",", "")) for k, v in found.items() if k.startswith("tokens per second")]
    assert len(speeds) == 2
    assert min(speeds) > 0


def test_every_family_has_its_text():
    """What it is, and a citation that names a work."""
    for family in FAMILIES.values():
        assert family.card.summary.endswith(".")
        assert re.match(r"@\w+\{\w+,\n.*title = ", family.card.citation, flags=re.S)


def test_other_models_are_refused(tmp_path):
    """A family that is not ours."""
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'gpt2'"):
        build_card(tmp_path)


@one_row_a_family
def test_callback_and_push(hub, row, tmp_path):
    """The card of a Trainer run is on the Hub after `push_to_hub`, with the run's last evaluation."""
    rows = [{"input_ids": some_ids()[0], "labels": 1} for _ in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1, use_cpu=True, disable_tqdm=True,
        hub_model_id="user/trained", save_strategy="no",
    )  # fmt: skip
    model = row.build("AutoModelForSequenceClassification")
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    ModelCardCallback.add_to(trainer, license="mit", language="en", speed=False)
    trainer.train()
    assert "## How to load" in (tmp_path / "README.md").read_text()
    trainer.push_to_hub()
    card = ModelCard.load("user/trained")
    assert card.data.license == "mit"
    assert 'from_pretrained("user/trained")' in str(card)
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["loss"] == pytest.approx(
        logged[-1], abs=1e-4
    )
    assert "2 steps" in str(card)


class TestCommand:
    """`hf-linear-attn card`."""

    @pytest.fixture
    def folder(self, tmp_path):
        """A saved model."""
        FAMILY_ROWS[0].build("AutoModel").save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    def test_writes_and_does_not_overwrite(self, folder, capsys):
        """README.md in the folder; a second time only when told."""
        assert main(["card", str(folder), "--no-speed", "--repo", "user/small"]) == 0
        assert 'from_pretrained("user/small")' in (folder / "README.md").read_text()
        with pytest.raises(SystemExit, match="2"):
            main(["card", str(folder), "--no-speed"])
        assert "--overwrite" in capsys.readouterr().err
        assert main(["card", str(folder), "--no-speed", "--overwrite", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["metadata"]["library_name"] == "transformers"

    def test_help_and_mistakes(self, folder, capsys):
        """Help has an example; a mistyped option suggests the right one; no model is named."""
        with pytest.raises(SystemExit, match="0"):
            main(["card", "--help"])
        assert "hf-linear-attn card outputs/leap" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="2"):
            main(["card", str(folder), "--licence", "mit"])
        assert "did you mean '--license'" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="2"):
            main(["card", str(folder / "nothing")])
        assert f"there is no folder '{folder / 'nothing'}'" in capsys.readouterr().err
        (folder / "nothing").mkdir()
        with pytest.raises(SystemExit, match="2"):
            main(["card", str(folder / "nothing")])
        assert "config.json" in capsys.readouterr().err


def test_a_distilled_model_names_its_teacher(tmp_path):
    """The report of a distillation becomes training text and scores; SEA's checkpoints carry their code, too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_linear_attn.conversion import linearize

    host = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    linearize(host, "sea", k=2, predictor_length=4).save_pretrained(tmp_path)
    report = {
        "after": {"perplexity": 12.5, "teacher_perplexity": 11.5, "top_k_recall": 0.5},
        "steps": 7, "seconds": 3.0, "peak_memory_mb": 100.0, "machine": {"device": "x86_64"},
        "options": {"example": False, "teacher": "me/teacher", "k": 2, "seed": 0},
    }  # fmt: skip
    (tmp_path / "distillation_report.json").write_text(json.dumps(report))
    card = build_card(tmp_path, speed=False)
    assert "Distilled from me/teacher (on the validation rows: perplexity 11.5)." in str(card)
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("perplexity", 12.5)]
    assert "trust_remote_code=True" in str(card)


def test_the_card_of_the_example_names_what_it_was_distilled_from(tmp_path):
    """A classifier's loss is one of texts, its teacher the example's, and it has no cache that could grow."""
    from transformers import BertConfig, BertForSequenceClassification

    from hf_linear_attn.conversion import linearize

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    host = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, **sizes))
    linearize(host, "sea", k=2, predictor_length=4).save_pretrained(tmp_path)
    report = {
        "after": {"loss": 0.5, "accuracy": 0.75, "teacher_accuracy": 0.8},
        "steps": 7, "seconds": 3.0, "peak_memory_mb": 100.0, "machine": {"device": "x86_64"},
        "options": {"example": True, "task": "classification", "teacher": None, "k": 2, "seed": 0},
    }  # fmt: skip
    (tmp_path / "distillation_report.json").write_text(json.dumps(report))
    card = str(build_card(tmp_path, speed=False))
    assert "Distilled from MiniLM" in card
    assert "| validation | Loss (nats per text) | 0.5 |" in card
    assert "nats per token |" not in card
    assert "cache grows" not in card
