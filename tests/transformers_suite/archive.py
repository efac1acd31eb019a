"""Import Transformers' shared test mixins from the unpacked source archive, with stand-ins for what the archive lacks."""

import importlib
import os
import sys
import types

import pytest

from .fetch import folder

PACKAGE = "transformers_archive_tests"


class NothingToExport:
    """Stands for `ExportTesterMixin` (tests/exporters, not in the archive); our own tests export (test_matrix_compile)."""


class NoGenerationTests:
    """Stands for `GenerationTesterMixin` (tests/generation, not in the archive); our own are test_matrix_generate*.py."""


# Values unlike any default, which a configuration has to keep (tests/utils/test_configuration_utils.py is not in the archive).
COMMON_CONFIG_VALUES = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "zero", 1: "one"},
    "label2id": {"zero": 0, "one": 1},
    "problem_type": "regression",
}
STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": NothingToExport},
    "generation.test_utils": {"GenerationTesterMixin": NoGenerationTests},
    "utils.test_configuration_utils": {"config_common_kwargs": COMMON_CONFIG_VALUES},
}


def load(name: str) -> types.ModuleType:
    """A module of the archive; where that was not downloaded, a failure in CI and a skip elsewhere."""
    path = folder()
    if not path.is_dir():
        reason = f"{path.name} is not unpacked: run `make suite` (downloads the source archive of transformers)"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason, allow_module_level=True)
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(path)]
        sys.modules[PACKAGE] = package
        for stand_in, names in STAND_INS.items():
            parent = f"{PACKAGE}.{stand_in.split('.')[0]}"
            sys.modules.setdefault(parent, types.ModuleType(parent))
            module = types.ModuleType(f"{PACKAGE}.{stand_in}")
            module.__dict__.update(names)
            sys.modules[module.__name__] = module
    return importlib.import_module(f"{PACKAGE}.{name}")
