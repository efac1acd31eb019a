"""Models of Transformers from safetensors files alone: a pickle can run code when it is opened."""

import os
from pathlib import Path
from typing import Any


def from_safetensors(auto_class: Any, source: str | os.PathLike, **arguments: Any) -> Any:
    """`auto_class.from_pretrained(source, **arguments)`, which opens no pickled weights.

    Raises:
        ValueError: `use_safetensors=False`.
        OSError: no safetensors weights, with the way to make some.
    """
    if arguments.pop("use_safetensors", None) is False:
        raise ValueError("`use_safetensors=False` asks for pickled weights, which are never opened here: leave it out")
    pickled = _pickles_alone(source)
    if pickled:
        raise OSError(_refusal(f"{source} holds only pickled weights ({pickled[0]})"))
    try:
        return auto_class.from_pretrained(source, use_safetensors=True, **arguments)
    except OSError as error:
        if os.path.isdir(source) or "use_safetensors" not in str(error):
            raise
        raise OSError(_refusal(f"{source} has no weights in safetensors files")) from error


def _pickles_alone(source: str | os.PathLike) -> list[str]:
    """The pickled weights in a folder that has no others, of a model or of an adapter."""
    if not os.path.isdir(source):
        return []
    for kind in ("pytorch_model", "adapter_model"):
        safe = "adapter_model*.safetensors" if kind == "adapter_model" else "*.safetensors"
        pickles = sorted(path.name for path in Path(source).glob(f"{kind}*.bin"))
        if pickles and not any(Path(source).glob(safe)):
            return pickles
    return []


def _refusal(what: str) -> str:
    return (
        f"{what}; a pickle can run code when it is opened, so none is opened here. If you trust where it comes from, save it "
        "once as safetensors with Transformers: `AutoModel...from_pretrained(folder).save_pretrained(new_folder)`"
    )
