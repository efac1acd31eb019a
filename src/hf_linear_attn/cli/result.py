"""How a command reports: words for people, or with `--json` one JSON object on stdout and everything else on stderr."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from ..terminal_text import printable


@contextlib.contextmanager
def words_aside(as_json: bool) -> Iterator[None]:
    """While open, what is printed goes to stderr if the result is to be JSON."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def show(result: dict[str, Any], text: str, as_json: bool, coloured: bool = False) -> None:
    """Print the result: as JSON, or the text that says the same; `coloured`: it is safe for a terminal, and has colours."""
    if as_json:
        print(json.dumps(_finite(result), default=str, allow_nan=False))
    else:
        print(text if coloured else printable(text))


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
