"""Files that are whole or not there: texts written in one step, and a check of what Trainer and Transformers have saved."""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

from ..modeling.shared.files.whole_files import write_whole

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file so that whoever looks, even after a power cut, finds the old one or the new one, never a part."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def model_files(folder: Path) -> list[str]:
    """Names of the files without which no model can be loaded from `folder`: configuration and weights, or an adapter's."""
    if any((folder / name).exists() for name in ADAPTER):
        return list(ADAPTER)
    if (folder / WEIGHTS).exists() or not (folder / WEIGHTS_INDEX).exists():
        return ["config.json", WEIGHTS]
    shards: set[str] = set()
    if damage(folder, [WEIGHTS_INDEX]) is None:
        shards = set(_read_json(folder / WEIGHTS_INDEX).get("weight_map", {}).values())
    return ["config.json", WEIGHTS_INDEX, *sorted(shards)]


def damage(folder: Path, names: Iterable[str]) -> str | None:
    """What is wrong with the first unusable one of these files, as in "optimizer.pt is missing"; None where all can be read.

    Weights are checked by their header and length, torch's files by the checksums in them; neither is loaded.
    """
    for name in names:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            _READERS[file.suffix](file)
        except Exception:  # a broken file can make these readers raise anything; whatever it is, the file is no use
            return f"{name} is {'damaged' if file.stat().st_size else 'empty'}"
    return None


def _read_json(file: Path) -> dict:
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found


def _read_torch(file: Path) -> None:
    with zipfile.ZipFile(file) as parts:
        if not any(name.endswith("/data.pkl") for name in parts.namelist()) or parts.testzip() is not None:
            raise ValueError(f"{file} is not what torch.save writes")


def _read_safetensors(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        tensors.keys()


_READERS = {".json": _read_json, ".pt": _read_torch, ".pth": _read_torch, ".safetensors": _read_safetensors}
