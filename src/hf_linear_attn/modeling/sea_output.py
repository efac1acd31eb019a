"""What a SEA model returns: the host's output class, extended by the fields that were asked for.

They are fields of a class, not keys added to an output: whoever takes outputs apart and puts them together again
(DistributedDataParallel, FSDP, pipelines of stages) builds them from their fields.
"""

from dataclasses import field, make_dataclass
from functools import cache

import torch
from transformers.utils import ModelOutput

from .compat import answer_to_both_names, answering_to_both_names, rebuilt_by

SEA_FIELDS = ("estimated_attentions", "kept_cells", "kept_keys", "attention_losses", "fidelity")


@cache
def sea_output_class(host_class: type[ModelOutput]) -> type[ModelOutput]:
    """The subclass of a host's output class with SEA's fields, each None unless it was asked for."""
    fields = [(name, tuple | None, field(default=None)) for name in SEA_FIELDS]
    name, bases = f"Sea{host_class.__name__}", (answering_to_both_names(host_class),)
    made = make_dataclass(name, fields, bases=bases, namespace={"__module__": __name__})
    return rebuilt_by(made, sea_output_class, host_class)


def extend_output(output: ModelOutput, **found: tuple) -> ModelOutput:
    """`output` with these of SEA's fields."""
    return sea_output_class(type(output))(**output, **found) if found else answer_to_both_names(output)


def with_loss(output: ModelOutput, loss: torch.Tensor) -> ModelOutput:
    """An output that had no loss with this one in its place: the first of the fields, also where they become a tuple."""
    return type(output)(loss=loss, **output)
