"""The code of a checkpoint: written flat from the tree of the source, complete, and the same again from what was written."""

import json
import re
from pathlib import Path

import pytest
import torch
from common.tiny import FAMILY_ROWS, first_output, one_row_a_family
from hub.fresh_process import run_without_package
from transformers import AutoModel

from hf_linear_attn.modeling.shared.files.exporter import ROOT, export_code
from hf_linear_attn.modeling.shared.files.whole_files import files_in

IMPORTED = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)


def code_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "code").glob("*.py")}


@one_row_a_family
def test_complete_and_flat(row, tmp_path):
    """Every module that is imported lies beside the one that does, and no line has moved."""
    row.build("AutoModel").save_pretrained(tmp_path)
    code = code_of(tmp_path)
    assert f"configuration_{row.family}.py" in code
    for name, text in code.items():
        assert {f"{each}.py" for each in IMPORTED.findall(text)} <= set(code), name
    written = {
        source.stem if source.stem.startswith(("modeling_", "configuration_"))
        else "_".join(source.relative_to(ROOT).with_suffix("").parts): source
        for source in ROOT.rglob("*.py")
    }  # fmt: skip
    for name, text in code.items():
        lines, source = text.splitlines(), written[name.removesuffix(".py")].read_text().splitlines()
        assert len(lines) == len(source)
        assert all(a == b or "import" in b for a, b in zip(lines, source))


@one_row_a_family
def test_an_export_of_an_export_is_the_same(row, tmp_path):
    row.build("AutoModel").save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"].partition(".")[0]
    (tmp_path / "again" / "code").mkdir(parents=True)
    export_code(tmp_path / f"{entry}.py", tmp_path / "again" / "code", root=(tmp_path / "code").resolve())
    assert code_of(tmp_path / "again") == code_of(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from . import other", "cannot be exported: import names, from a file"),
        ("from .other import *", "cannot be exported: import names, from a file"),
        ("from .missing import x", "names no file of"),
        ("from ..outside import x", "names no file of"),
        ('"""\nfrom .other import x\n"""', "would be read as an import: rephrase it"),
    ],
)
def test_what_the_loader_would_not_follow_is_refused(tmp_path, line, message):
    """Transformers' loader loses such lines, or takes them for what they are not."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "other.py").write_text("x = 1\n")
    (tmp_path / "outside.py").write_text("x = 1\n")
    (root / "modeling_a.py").write_text(f"from .other import x\n{line}\n")
    with pytest.raises(ValueError, match=f"modeling_a.py, line .*{message}"):
        export_code(root / "modeling_a.py", tmp_path, root=root.resolve())


def test_two_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("x = 1\n")
    (tmp_path / "a_b.py").write_text("x = 1\n")
    (tmp_path / "modeling_a.py").write_text("from .a.b import x\nfrom .a_b import x as y\n")
    with pytest.raises(ValueError, match=r"would both be exported as a_b\.py: rename one"):
        export_code(tmp_path / "modeling_a.py", tmp_path / "out", root=tmp_path.resolve())


def as_release_0_1_0_wrote_it(folder: Path) -> None:
    """Move the code of a checkpoint beside its weights."""
    for path in (folder / "code").iterdir():
        path.rename(folder / path.name)
    (folder / "code").rmdir()
    fields = json.loads((folder / "config.json").read_text())
    fields["auto_map"] = {name: value.removeprefix("code/") for name, value in fields["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(fields))


@one_row_a_family
def test_saving_over_code_beside_the_weights(row, tmp_path):
    """A checkpoint as release 0.1.0 wrote them loads, and one saved over it leaves none of its code."""
    older, newer = row.build("AutoModel"), row.build("AutoModel", seed=1)
    older.save_pretrained(tmp_path)
    as_release_0_1_0_wrote_it(tmp_path)
    (tmp_path / "own.py").write_text("mine = 1\n")
    torch.testing.assert_close(first_output(AutoModel.from_pretrained(tmp_path).eval()), first_output(older))
    newer.save_pretrained(tmp_path)
    assert {name for name in files_in(tmp_path) if name.endswith(".py") and not name.startswith("code/")} == {"own.py"}
    torch.testing.assert_close(first_output(AutoModel.from_pretrained(tmp_path).eval()), first_output(newer))


@one_row_a_family
def test_without_code(row, tmp_path):
    """`include_code=False` over a checkpoint that has code leaves none."""
    row.build("AutoModel").save_pretrained(tmp_path)
    row.build("AutoModel").save_pretrained(tmp_path, include_code=False)
    assert not (tmp_path / "code").exists()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_a_folder_saved_by_a_fresh_process(tmp_path):
    """Where the package is absent a checkpoint loads from its code, and what is saved there has the same."""
    row = FAMILY_ROWS[0]
    row.causal_lm().save_pretrained(tmp_path / "first")
    script = tmp_path / "again.py"
    script.write_text(
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])\n"
    )
    done = run_without_package(script, tmp_path / "first", tmp_path / "second", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert code_of(tmp_path / "second") == code_of(tmp_path / "first")
