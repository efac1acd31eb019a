"""Code for checkpoint folders that have none, and for what Trainer pushes while it trains."""

import json
import os
from pathlib import Path

from transformers import TrainerCallback

from ..families import FAMILIES
from ..modeling.shared.configuration import FORMAT_FIELD, format_of
from ..modeling.shared.files.checkpoint import auto_map, copy_code
from ..modeling.shared.files.whole_files import put_in_place, staging_folder


def add_code(folder: str | os.PathLike) -> None:
    """Give a checkpoint folder its family's code and a complete `auto_map`.

    `save_pretrained` and `push_to_hub` do this by themselves; a folder saved with `include_code=False` can be completed here
    before it is uploaded by other means.

    Args:
        folder: a folder with a `config.json` of one of our families.

    Raises:
        FileNotFoundError: no `config.json` in `folder`.
        ValueError: the configuration is of another family.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give the folder of a saved model")
    family = json.loads(path.read_text()).get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path} is of model type {family!r}; code can be added for {', '.join(map(repr, FAMILIES))}")
    body = FAMILIES[family].head("AutoModel")
    config = FAMILIES[family].config_class().from_pretrained(folder)
    with staging_folder(folder) as staging:
        copy_code(body, config, staging)
        fields = json.loads(path.read_text()) | {"auto_map": auto_map(body, config), FORMAT_FIELD: format_of(config)}
        (staging / path.name).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        put_in_place(staging, folder)


class PushCodeCallback(TrainerCallback):
    """Completes what `Trainer(push_to_hub=True)` pushes while it trains.

    For these pushes Trainer copies weights and configuration out of the checkpoint, but no code. The push at the end
    (`trainer.push_to_hub()`) has it without this callback.
    """

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        """Put the code where Trainer uploads from."""
        if state.is_world_process_zero and hasattr(type(model), "config_class"):
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with staging_folder(folder) as staging:
                copy_code(type(model), model.config, staging)
                put_in_place(staging, folder)
