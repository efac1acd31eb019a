"""Transformers' own tests of a model (`ModelTesterMixin`, `ConfigTester`, `TrainingTesterMixin`) for every family and head.

They come from the source archive of the installed version; every test that is left out says why.
"""

import unittest

import pytest
import torch
from common.families import ROWS, Row
from transformers_suite import archive

pytestmark = [pytest.mark.long, pytest.mark.thorough]

modeling = archive.load("test_modeling_common")
configuration = archive.load("test_configuration_common")
training = archive.load("test_training_mixin")

# Between them every module and parameter of every family (SwiGLU in DANet's decoder, ReLU and scaled norms in its encoder). Other
# variants differ in arithmetic alone, which these tests do not look at.
NAMES = ("leap", "fastformer", "fastformer-encoder", "danet-swiglu", "danet-encoder", "sea", "sea-encoder")


class Sizes:
    """What the mixins ask for: sizes, a configuration and a batch."""

    batch_size = 3
    seq_length = 10
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 2
    num_choices = 4
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
        # The tests want Transformers' usual small weights.
        layers = self.row.layers(self.num_hidden_layers)
        return self.row.config(**layers, hidden_size=self.hidden_size, initializer_range=0.02)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[0, :3] = mask[1, 8:] = mask[2, 4] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class MixinSettings(modeling.ModelTesterMixin, training.TrainingTesterMixin):
    """The mixins with our settings; a class for each row inherits from it."""

    row: Row
    # At the mixin's 1e-3 the loss falls as asked, but the gradient has not vanished by its 300 steps; here a quarter does.
    training_overfit_learning_rate = 6e-3
    training_overfit_steps = 80

    def setUp(self):
        if self.row.family == "danet" and "eager_matches_sdpa_inference" in self._testMethodName:
            self.skipTest("no layer of this row has softmax; those of hybrids are compared in tests/danet")
        self.model_tester = Sizes(self.row)

    def test_config(self):
        config_class = type(self.model_tester.get_config())
        # `can_init_without_params` demands silence, and tiny heads draw our warning about the head size.
        sizes = {"hidden_size": 64, "num_attention_heads": 1}
        if self.row.family == "sea":  # sizes are the host's
            sizes = {"has_text_modality": False, "common_properties": []}
        configuration.ConfigTester(self, config_class=config_class, **sizes).run_common_tests()

    def test_bc_cache_name_forward(self):
        if not self.row.causal:
            self.skipTest("an encoder refuses `use_cache`, which the mixin gives; names: test_matrix_releases")
        super().test_bc_cache_name_forward()

    def test_retain_grad_hidden_states_attentions(self):
        # Our maps are built beside the means, which are never computed from a T x T matrix: no gradient goes through them.
        self.has_attentions = False
        super().test_retain_grad_hidden_states_attentions()

    def test_attention_outputs(self):
        # The mixin asks through the configuration, which Transformers allows for its own attention functions alone; a call
        # that asks is tested in tests/sea.
        if self.row.family == "sea":
            self.skipTest("SEA gives its attention to calls that ask for it, not through the configuration")
        super().test_attention_outputs()

    def test_bc_torch_dtype(self):
        # Every class is saved once and loaded fourteen times: nothing in it depends on the head or the direction.
        if not self.row.causal:
            self.skipTest("the causal row of the family loads the same classes")
        self.all_model_classes = self.all_model_classes[1:2]
        super().test_bc_torch_dtype()

    def test_can_set_attention_dynamically(self):
        if self.row.family == "sea":
            self.skipTest("the attention function of a SEA model is SEA")
        super().test_can_set_attention_dynamically()

    def test_init_weights_can_init_buffers(self):
        if self.row.family == "sea":
            self.skipTest("the mixin asks the host's class, which does not know SEA's random features; ours draws them")
        super().test_init_weights_can_init_buffers()

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        # The mixin wants a gradient for every parameter from the task's loss. test_matrix_training compares those that there are.
        if self.row.name == "sea":
            self.skipTest("causal SEA's estimator only chooses keys: it learns from the losses of distillation alone")
        super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        prepared = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            # As Transformers' own test of BERT does: the mixin knows no labels for this kind of head.
            prepared["labels"] = torch.zeros(prepared["input_ids"].shape, dtype=torch.long)
            prepared["next_sentence_label"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        return prepared

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        batch = super()._create_text_training_batch(batch_size, seq_length, vocab_size)
        if not self.row.causal:
            # The mixin gives labels for tokens and the same text twice; a classifier of texts needs two that differ.
            batch = {"input_ids": batch["input_ids"].clone(), "labels": torch.arange(batch_size)}
            batch["input_ids"][1] += 20
        return batch


def _suite(row: Row) -> type:
    name = "".join(part.capitalize() for part in row.name.split("-")) + "ModelTest"
    bases = [MixinSettings, unittest.TestCase]
    if row.causal:
        bases.insert(1, archive.NoGenerationTests)
    return type(name, tuple(bases), {"row": row, "all_model_classes": tuple(row.heads().values())})


globals().update({suite.__name__: suite for suite in map(_suite, (row for row in ROWS if row.name in NAMES))})
