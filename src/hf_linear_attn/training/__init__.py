"""Training on real text: data, tokenizer, options, a Trainer run with a learning curve, resuming; distillation."""

_LAZY = {"SeaDistillationTrainer": "sea_distillation", "SeaDistillationArguments": "sea_distillation"}
_LAZY |= {
    "HedgehogDistillationTrainer": "hedgehog_distillation",
    "HedgehogDistillationArguments": "hedgehog_distillation",
}
_LAZY |= {"add_lora": "distillation"}


def __getattr__(name: str):
    # On first use: the command line reads options from here, and its help must not wait for torch.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
