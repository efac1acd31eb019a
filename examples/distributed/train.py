"""One training script for a single process, DDP, FSDP2 and DeepSpeed: the launcher's configuration decides.

    accelerate launch --config_file examples/distributed/ddp.yaml examples/distributed/train.py --output outputs/ddp
    torchrun --nproc-per-node 2 examples/distributed/train.py --cpu --output outputs/ddp
    torchrun --nproc-per-node 2 examples/distributed/train.py --cpu --shard --output outputs/sharded

`--masked` trains an encoder on masked words: --family danet --masked --config '{"is_causal": false}'.
`--teacher FOLDER` distils a pretrained BERT, Llama, OPT or GPT-2 into its SEA student: --teacher FOLDER --config '{"k": 64}'.
`--batch-size` counts rows over all processes, so that runs on another number of processes see the same batches.
The loss of every step goes to OUTPUT/losses.json.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainingArguments, set_seed

from hf_linear_attn.conversion import linearize
from hf_linear_attn.families import FAMILIES
from hf_linear_attn.training import SeaDistillationArguments, SeaDistillationTrainer
from hf_linear_attn.training.masked_words import MaskedOnce, MaskingCollator
from hf_linear_attn.training.text_data import load_files, load_speeches
from hf_linear_attn.training.tokenized_text import TokenBlocks, prepare_text


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="leap", choices=list(FAMILIES))
    parser.add_argument("--teacher", help="folder or Hub id of a pretrained model, distilled into its SEA student")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of the configuration, as JSON")
    parser.add_argument("--masked", action="store_true", help="guess masked words (encoders), not the next word")
    parser.add_argument("--data", nargs="*", default=[], help="text files (default: the State of the Union speeches)")
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step over all processes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--shard", action="store_true", help="shard with Transformers' own FSDP2, also on CPU")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def auto_class(options: argparse.Namespace):
    """The Auto class of the models that the options train."""
    return AutoModelForMaskedLM if options.masked else AutoModelForCausalLM


def build_model(options: argparse.Namespace, vocabulary: int, shards: int):
    """The model of the family with its first weights, the same on every number of processes; sharded on request."""
    set_seed(0)
    if options.teacher:
        model = linearize(auto_class(options).from_pretrained(options.teacher), "sea", **options.config)
    else:
        sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "hidden_dropout_prob": 0.0}
        config = FAMILIES[options.family].config_class()(**(sizes | {"vocab_size": vocabulary} | options.config))
        model = auto_class(options).from_config(config)
    if shards == 1:
        return model
    from transformers.distributed import DistributedConfig

    # Each process loads its own shards of what process 0 wrote.
    start = options.output / "initial"
    if int(os.environ["RANK"]) == 0:
        model.save_pretrained(start, include_code=False)
    torch.distributed.barrier()
    return auto_class(options).from_pretrained(start, distributed_config=DistributedConfig(fsdp_size=shards))


def save_whole(model, options: argparse.Namespace) -> None:
    """Gather the shards, which all processes have to do, and save them from process 0 as an ordinary checkpoint."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if int(os.environ["RANK"]) == 0:
        whole = auto_class(options).from_pretrained(options.output / "initial")
        whole.load_state_dict(weights)
        whole.save_pretrained(options.output)
    torch.distributed.barrier()


def build_trainer(options: argparse.Namespace, model, arguments: TrainingArguments, rows, tokenizer) -> Trainer:
    """A Trainer, or that of distillation with a whole teacher in every process."""
    if not options.teacher:
        return Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    teacher = auto_class(options).from_pretrained(options.teacher)
    return SeaDistillationTrainer(model, teacher, arguments, train_dataset=rows, processing_class=tokenizer)


def main() -> None:
    """Train, and write down every loss."""
    options = parse()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.resume and options.shard:
        raise SystemExit("--shard keeps no optimizer state to resume from: use examples/distributed/fsdp2.yaml")
    if options.batch_size % processes:
        raise SystemExit(f"--batch-size {options.batch_size} is not a multiple of the {processes} processes")
    names = {"activation_checkpointing", "gradient_checkpointing"} & set(TrainingArguments.__dataclass_fields__)
    checkpointing = {min(names): True} if options.activation_checkpointing else {}
    arguments_class = SeaDistillationArguments if options.teacher else TrainingArguments
    arguments = arguments_class(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size // processes,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=options.save_steps,
        seed=0,
        use_cpu=options.cpu,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not options.cpu,
        save_strategy="no" if options.shard else "steps",  # not every Trainer can save what was sharded while loading
        **checkpointing,
    )
    with arguments.main_process_first(desc="tokenizing"):
        text = load_files(options.data, [], []) if options.data else load_speeches()
        tokenizer, tokens = prepare_text(text, options.vocab_size, options.teacher, for_encoder=options.masked)
    rows = TokenBlocks(tokens.ids["train"], options.block_length, name="train")
    if options.masked:  # drawn once, so that every number of processes guesses the same words
        rows = MaskedOnce(rows, MaskingCollator(tokenizer, share=0.15))
    model = build_model(options, len(tokenizer), processes if options.shard else 1)
    trainer = build_trainer(options, model, arguments, rows, tokenizer)
    if options.shard:  # while loading: Accelerate is to leave the model as it is
        trainer.accelerator.prepare_model = lambda model, **_: model
    trainer.train(resume_from_checkpoint=options.resume or None)
    sharded = sum("DTensor" in type(p).__name__ for p in trainer.model.parameters())
    if options.shard:
        save_whole(trainer.model, options)
    else:
        trainer.save_model()
    if trainer.is_world_process_zero():
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
        found = {"losses": losses, "processes": processes, "kind": kind, "sharded_parameters": sharded}
        (options.output / "losses.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
