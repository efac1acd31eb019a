"""What is chosen of the kernels' tests where Triton's interpreter runs them on a CPU (`-m interpreted`)."""

import re

import pytest


def pytest_collection_modifyitems(config, items):
    """Of a test marked `interpreted(pattern)`, the cases whose id begins with the pattern."""
    if config.getoption("markexpr") != "interpreted":
        return
    for item in items:
        mark = item.get_closest_marker("interpreted")
        if mark and mark.args and not re.match(mark.args[0], item.callspec.id):
            item.add_marker(pytest.mark.skip(reason="one of the cases that the interpreter takes minutes for"))
