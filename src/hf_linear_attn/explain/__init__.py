"""What models look at, as numbers and pictures.

from hf_linear_attn.explain import importance

print(importance(model, tokenizer, "The state of the Union is strong.").to_terminal())

Everything here takes a model, its tokenizer and one text. Numbers come from the layers' real attention rows or focus
weights, at no more than O(n) memory for focus weights and alignments, and O(n^2) a head for everything that needs rows.
`faithfulness` measures whether an explanation is true of the model.

`explain_paths` is of another kind: it tells which fast path each layer takes on this machine, and why not a faster one.
"""

from .context_length import ContextLosses, EffectiveContext, context_losses, effective_context
from .deletion_test import Faithfulness, faithfulness
from .family_rows import AttentionRows, attention_rows, rollout
from .leap_alignment import alignments
from .paths import PathRow, PathTable, explain_paths
from .token_importance import Importance, importance
from .token_influence import Influence, LayerHeadMaps, attention_maps, influence

__all__ = [
    "AttentionRows",
    "ContextLosses",
    "EffectiveContext",
    "Faithfulness",
    "Importance",
    "Influence",
    "LayerHeadMaps",
    "PathRow",
    "PathTable",
    "alignments",
    "attention_maps",
    "attention_rows",
    "context_losses",
    "effective_context",
    "explain_paths",
    "faithfulness",
    "importance",
    "influence",
    "rollout",
]
