"""Names of Transformers that its documentation does not promise are touched in `modeling/shared/compat.py` alone, and exist.

`registration.py` alone may, too: it must not load the models' code, and compat does.
"""

import ast
from pathlib import Path

import pytest
import transformers
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.generation import GenerationMixin

from hf_linear_attn.modeling.shared import compat

SOURCE = Path(compat.__file__).parents[2]
BORDER = (Path(compat.__file__), SOURCE / "registration.py")
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path not in BORDER]
# What the documentation describes: the names of the package itself, and these modules.
DOCUMENTED = {
    "transformers.activations": {"ACT2FN"},
    "transformers.modeling_outputs": None,  # every class of it
    "transformers.utils": {"ModelOutput", "logging"},
}
# The classes that ours derive from or talk to.
BASES = (
    PreTrainedModel, GenerationMixin, PreTrainedConfig, Cache, DynamicCache, Trainer, TrainingArguments,
    compat.CacheLayerMixin, compat.LinearAttentionLayer, transformers.PreTrainedTokenizerFast,
    transformers.Pipeline,
)  # fmt: skip


def undocumented_imports(path: Path) -> list[str]:
    """`module.name` of every import from Transformers that is not documented."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("transformers.")]
        elif (
            isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "transformers"
        ):
            for alias in node.names:
                if node.module == "transformers":
                    allowed = hasattr(transformers, alias.name) and not alias.name.startswith("_")
                else:
                    names = DOCUMENTED.get(node.module, set())
                    allowed = names is None or alias.name in names
                if not allowed:
                    found.append(f"{node.module}.{alias.name}")
    return found


def private_names(path: Path) -> set[str]:
    """Names with a leading underscore that the file defines on a class or reads from an object."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.FunctionDef):
                    found.add(each.name)
                elif isinstance(each, ast.Assign):
                    found |= {target.id for target in each.targets if isinstance(target, ast.Name)}
                elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                    found.add(each.target.id)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            found |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_through_compat(path):
    assert undocumented_imports(path) == []


def test_hooks_are_listed_in_compat():
    """A private attribute of Transformers' classes that we set, override or read stands in `PRIVATE_HOOKS`."""
    theirs = {name for base in BASES for name in dir(base) if name.startswith("_") and not name.startswith("__")}
    used = {name: path.name for path in FILES for name in private_names(path) & theirs}
    assert set(used) <= set(compat.PRIVATE_HOOKS), {n: f for n, f in used.items() if n not in compat.PRIVATE_HOOKS}
    assert set(compat.PRIVATE_HOOKS) <= set(used), "listed, but not used any more"


def test_the_check_sees_a_private_name(tmp_path):
    """Control: what the two checks look for, in a file that does it."""
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import transformers.cache_utils\nfrom transformers.generation.utils import GenerationMixin\n"
        "class A:\n    _no_split_modules = []\n    def f(self, model):\n        return model._tied_weights_keys\n"
    )
    assert undocumented_imports(bad) == ["transformers.cache_utils", "transformers.generation.utils.GenerationMixin"]
    assert private_names(bad) == {"_no_split_modules", "_tied_weights_keys"}
