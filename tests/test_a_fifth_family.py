"""A new family is one folder, one record, one row: a toy, put into a copy of the package and of the tests, passes the matrix.

Of the matrix a part that takes seconds runs here, on the toy's row: what padding, packing and states mean, and that a checkpoint
carries the family's code. All of it: `python tests/test_a_fifth_family.py FOLDER`, then pytest -k echo in that folder.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[1]
RECORD = """
ECHO = Family(
    name="echo",
    module=f"{HERE}.modeling.echo",
    configuration="EchoConfig",
    classes={
        "configuration_echo": ("EchoConfig",),
        "modeling_echo": ("EchoModel", "EchoForCausalLM", "EchoForSequenceClassification"),
    },
    heads=heads("Echo", "Model", "ForCausalLM", "ForSequenceClassification"),
    lora_targets=("v_proj",),
    sizes=Sizes(),
    card=Card("A toy: every head hears the mean of what was said.", "@misc{echo,\\n  title = {Echo}\\n}"),
)
"""
ROW = '    Row("echo", "echo", bounded=False, positional=False, shift_invariant=True, explains=False),\n'
MATRIX = ("test_matrix_forward.py", "test_matrix_padding.py", "test_matrix_packing.py", "hub/test_without_package.py")
# `tests/common/families.py` lists rows, `families.py` records: what is put in stands before these lines.
BEFORE_THE_ROWS, BEFORE_THE_RECORDS = "]\nROWS.append(", "FAMILIES: dict[str, Family] = {"
LAST_RECORD = "DANET, SEA, HEDGEHOG)"


def add_the_family(folder: Path) -> None:
    """Copy package and tests into `folder`, and add what a contributor would."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "tests" / "echo", folder / "src" / "hf_linear_attn" / "modeling" / "echo")  # the folder
    (folder / "src" / "hf_linear_attn" / "modeling" / "echo" / "__init__.py").touch()
    records = folder / "src" / "hf_linear_attn" / "families.py"
    text = records.read_text()
    assert text.count(BEFORE_THE_RECORDS) == text.count(LAST_RECORD) == 1
    text = text.replace(BEFORE_THE_RECORDS, f"{RECORD.lstrip()}\n{BEFORE_THE_RECORDS}")  # the record
    records.write_text(text.replace(LAST_RECORD, LAST_RECORD.replace("HEDGEHOG)", "HEDGEHOG, ECHO)")))
    rows = folder / "tests" / "common" / "families.py"
    text = rows.read_text()
    assert text.count(BEFORE_THE_ROWS) == 1
    rows.write_text(text.replace(BEFORE_THE_ROWS, ROW + BEFORE_THE_ROWS))  # the row


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_a_fifth_family(tmp_path):
    add_the_family(tmp_path)
    files = [f"tests/{name}" for name in MATRIX]
    printed = run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "echo", "-m", "not slow", *files)
    assert int(printed.rpartition(" passed")[0].rpartition("\n")[2].split()[-1]) > 40, printed
    helped = run(tmp_path, "-m", "hf_linear_attn_cli", "train", "--help")
    assert "leap|fastformer|danet|echo|gpt2|bert" in "".join(helped.split())
    small = (
        "--hidden-size 16 --num-hidden-layers 1 --num-attention-heads 1 --vocab-size 300 --block-length 16 --steps 2"
    )
    few = "--eval-tokens 64 --final-eval-tokens 64 --cpu --output out"
    text = "src/hf_linear_attn/training/speeches/1863-Lincoln-1.txt"
    words = f"train --family echo {small} {few} --data {text}".split()
    report = run(tmp_path, "-m", "hf_linear_attn_cli", *words)
    assert "echo," in report
    assert "no limit of length" in report


if __name__ == "__main__":
    add_the_family(Path(sys.argv[1]))
