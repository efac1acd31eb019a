"""Names of the package that are not public, wherever a checkout defines them: a suite measures this one or an older one."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import hf_linear_attn


@cache
def private(name: str) -> Any:
    """The function or class `name` of `hf_linear_attn.modeling`; ImportError where no file there defines it."""
    root = Path(hf_linear_attn.__file__).parent
    for file in sorted((root / "modeling").rglob("*.py")):
        if re.search(rf"^(?:def|class) {name}\b", file.read_text(), re.MULTILINE):
            module = ".".join(file.relative_to(root).with_suffix("").parts)
            return getattr(import_module(f"hf_linear_attn.{module}"), name)
    raise ImportError(f"no file of {root / 'modeling'} defines {name}")
