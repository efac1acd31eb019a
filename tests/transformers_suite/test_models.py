"""Transformers' own tests of a model (`ModelTesterMixin`, `ConfigTester`, `TrainingTesterMixin`) for every family and head.

They come from the source archive of the installed version; every test that is left out says why.
"""

import unittest

import torch
from common.families import ROWS, Row

from transformers_suite import archive

modeling = archive.load("test_modeling_common")
configuration = archive.load("test_configuration_common")
training = archive.load("test_training_mixin")

# Variants that differ in their modules or parameters; the others differ in arithmetic alone, which these tests do not look at.
NAMES = ("leap", "leap-rotary", "fastformer", "fastformer-encoder")


class Tester:
    """What the mixins ask for: sizes, a configuration and a batch."""

    batch_size = 3
    seq_length = 10
    num_hidden_layers = 2
    hidden_size = 16
    num_attention_heads = 2
    is_training = True

    def __init__(self, row: Row):
        self.row = row
        config = self.get_config()
        self.vocab_size, self.pad_token_id = config.vocab_size, config.pad_token_id
        heads = row.heads()
        self.base_model_class = heads["AutoModel"]
        self.causal_lm_class = heads.get("AutoModelForCausalLM")
        self.sequence_classification_class = heads["AutoModelForSequenceClassification"]

    def get_config(self):
        layers = {"num_hidden_layers": self.num_hidden_layers}
        if "layer_windows" in {**vars(self.row.config())}:
            layers["layer_windows"] = [None, 3]
        # The tests want Transformers' usual small weights.
        return self.row.config(**layers, initializer_range=0.02)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[0, :3] = mask[1, 8:] = mask[2, 4] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Suite(modeling.ModelTesterMixin, training.TrainingTesterMixin):
    """The mixins with our settings; a class for each row inherits from it."""

    row: Row
    # The base class would look generative classes up in tests that the archive does not carry.
    fx_compatible = False
    test_resize_position_embeddings = False

    def setUp(self):
        self.model_tester = Tester(self.row)

    def test_config(self):
        config_class = type(self.model_tester.get_config())
        # `can_init_without_params` demands silence, and tiny heads draw our warning about the head size.
        sizes = {"hidden_size": 64, "num_attention_heads": 1}
        configuration.ConfigTester(self, config_class=config_class, **sizes).run_common_tests()


def _suite(row: Row) -> type:
    name = "".join(part.capitalize() for part in row.name.split("-")) + "ModelTest"
    bases = [Suite, unittest.TestCase]
    if row.causal:
        bases.insert(1, archive.NoGenerationTests)
    return type(name, tuple(bases), {"row": row, "all_model_classes": tuple(row.heads().values())})


for _row in ROWS:
    if _row.name in NAMES:
        _class = _suite(_row)
        globals()[_class.__name__] = _class
del _row, _class, Suite
