"""Measuring models with lm-eval, evaluate and scikit-learn."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common.families import FIRST, ROWS, VOCAB, first_rows, in_every_run
from common.tiny import FAMILY_ROWS, some_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_linear_attn.metrics import metric_path

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "examples" / "lm_eval"


def byte_tokenizer():
    """One token a byte, for text as it comes; ids 0 and 1 are <pad> and <eos>."""
    vocabulary = {"<pad>": 0, "<eos>": 1}
    vocabulary |= {sign: 2 + i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>")


@pytest.fixture
def checkpoint(row, tmp_path):
    """A byte-level model and its tokenizer in a folder."""
    model = row.causal_lm(vocab_size=258, max_position_embeddings=1024)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return model, tmp_path


def bits_per_byte(model):
    """What the shipped task measures, straight from the logits."""
    tokenizer, bits, length = byte_tokenizer(), 0.0, 0
    for line in (TASKS / "speeches.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            bits += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / math.log(2)
        length += len(text.encode())
    return bits / length


@in_every_run("leap", of=FIRST)
def test_lm_eval_on_a_folder(checkpoint, monkeypatch):
    """`lm_eval` gives the bits per byte that the logits give."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)
    model, folder = checkpoint
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=str(folder), device="cpu", batch_size=2, dtype="float32"),
        tasks=["speeches"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results["results"]["speeches"]["bits_per_byte,none"] == pytest.approx(bits_per_byte(model), rel=1e-4)


@pytest.mark.slow
@first_rows
def test_lm_eval_command(checkpoint):
    """The command line, which knows nothing of this package, through the code in the checkpoint."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval")
    model, folder = checkpoint
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "speeches", "--device", "cpu",
        "--model_args", f"pretrained={folder},dtype=float32,trust_remote_code=True",
        "--include_path", str(TASKS), "--output_path", str(folder / "results.json"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(folder.glob("results*.json")).read_text())
    measured = found["results"]["speeches"]["bits_per_byte,none"]
    assert measured == pytest.approx(bits_per_byte(model), rel=1e-4)


class TestOurMetrics:
    """The metric scripts, loaded by `evaluate` from their path."""

    @pytest.fixture(autouse=True)
    def _needs_evaluate(self):
        self.evaluate = pytest.importorskip("evaluate", reason="needs evaluate: pip install hf-linear-attn[train]")

    @first_rows
    def test_bits_per_byte(self, checkpoint):
        """On a model's losses it equals the direct computation."""
        model, _ = checkpoint
        metric = self.evaluate.load(metric_path("bits_per_byte"))
        tokenizer = byte_tokenizer()
        for line in (TASKS / "speeches.jsonl").read_text().splitlines():
            text = json.loads(line)["text"]
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
            with torch.no_grad():
                metric.add(prediction=model(ids, labels=ids).loss.item() * (ids.shape[1] - 1), reference=text)
        found = metric.compute()
        assert found["bits_per_byte"] == pytest.approx(bits_per_byte(model), rel=1e-6)
        assert found["byte_perplexity"] == pytest.approx(2 ** found["bits_per_byte"])

    def test_bits_are_counted_per_byte_of_utf8(self):
        """A sign of three bytes counts three times; no text is an error."""
        metric = self.evaluate.load(metric_path("bits_per_byte"))
        assert metric.compute(predictions=[math.log(2) * 6], references=["€"])["bits_per_byte"] == pytest.approx(2.0)
        with pytest.raises(ValueError, match="at least one byte"):
            metric.compute(predictions=[1.0], references=[""])

    def test_recall_at_k(self):
        """Worked examples, and what it refuses."""
        metric = self.evaluate.load(metric_path("recall_at_k"))
        scores, relevant = [[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]], [[1, 0], [2]]
        assert metric.compute(predictions=scores, references=relevant, k=1)["recall_at_k"] == pytest.approx(0.25)
        assert metric.compute(predictions=scores, references=relevant, k=2)["recall_at_k"] == pytest.approx(0.75)
        assert metric.compute(predictions=scores, references=relevant, k=3)["recall_at_k"] == pytest.approx(1.0)
        for wrong in ({"k": 0}, {"references": [[3], [0]]}, {"references": [[], [0]]}):
            with pytest.raises(ValueError, match=r"`k`|references"):
                metric.compute(**({"predictions": scores, "references": relevant} | wrong))

    def test_unknown_name(self):
        """The names that there are."""
        with pytest.raises(ValueError, match="'bits_per_byte', 'recall_at_k'"):
            metric_path("bits")


@pytest.mark.parametrize("row", [row for row in ROWS if row in FAMILY_ROWS or not row.causal], ids=lambda row: row.name)
def test_scikit_learn_in_trainer(row, tmp_path):
    """`compute_metrics` sees one row of logits a text, whatever else the model returns."""
    from sklearn.metrics import accuracy_score

    model = row.build("AutoModelForSequenceClassification", num_labels=3)
    rows = [{"input_ids": (some_ids()[0] + i) % VOCAB, "labels": i % 3} for i in range(8)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=3)

    def accuracy(prediction):
        assert prediction.predictions.shape == (8, 3)
        return {"accuracy": accuracy_score(prediction.label_ids, prediction.predictions.argmax(-1))}

    found = Trainer(model, arguments, eval_dataset=rows, compute_metrics=accuracy).evaluate()["eval_accuracy"]
    with torch.no_grad():
        expected = sum(model(each["input_ids"][None]).logits.argmax().item() == each["labels"] for each in rows) / 8
    assert found == pytest.approx(expected)
