"""Saved configurations are readable by whoever reads them in Transformers, and come back equal."""

import json

from common.families import all_rows
from transformers import AutoConfig, PreTrainedConfig


@all_rows
def test_the_base_class_reads_it(row, tmp_path):
    """Trainer reads the configuration of a checkpoint with the base class when it resumes."""
    config = row.config()
    config.save_pretrained(tmp_path)
    PreTrainedConfig.from_json_file(str(tmp_path / "config.json"))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.layer_types == config.layer_types
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == row.family
