"""`hf-linear-attn convert`: pretrained models and published checkpoints into our families, and our models into ONNX."""

from pathlib import Path
from typing import Any

from ..families import FAMILIES
from ..terminal_text import printable
from ..training.options import key_values, path
from .parser import Parser, one_of
from .quiet import begin_work, say_if_no_folder
from .result import show, words_aside

DESCRIPTION = """\
Convert a checkpoint.

--to sea       a pretrained BERT, Llama, OPT or GPT-2, with every weight it has; what SEA adds starts from random weights,
               and `hf-linear-attn distill` teaches it
--to hedgehog  a pretrained causal model like Llama, Mistral, Qwen, SmolLM, Gemma, GPT-2 or OPT, with every weight it has; its
               state gets a fixed size, and inside its window it predicts what it did
--to leap, fastformer, danet
               a checkpoint of the published packages: a folder with their config.json and safetensors weights
--to onnx      the decoding step of a causal model whose layers are all recurrent, for onnxruntime without PyTorch
"""

EXAMPLES = """\
examples:
  hf-linear-attn convert openai-community/gpt2 outputs/sea --to sea --set k=32 predictor_length=64
  hf-linear-attn convert published-leap outputs/leap --to leap
  hf-linear-attn convert outputs/leap outputs/onnx --to onnx
      writes outputs/onnx/step.onnx and the state before the first token beside it
"""

LINEARIZED = tuple(name for name, family in FAMILIES.items() if family.linearizes)
TARGETS = (*LINEARIZED, *(n for n, f in FAMILIES.items() if f.published and n not in LINEARIZED), "onnx")
DTYPES = ("float32", "bfloat16", "float16")


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="hf-linear-attn convert", description=DESCRIPTION, epilog=EXAMPLES)
    made.add_checkpoint("folder or Hub name of the checkpoint", name="source")
    made.add_argument("output", type=path, help="folder for the converted one")
    made.add_argument("--to", required=True, type=one_of(TARGETS), metavar="|".join(TARGETS), help="what to make of it")
    made.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="sea, hedgehog: fields of SeaConfig or HedgehogConfig, as in k=32 softmax_layers=[0]",
    )
    made.add_argument(
        "--task", metavar="AUTO", help="sea, hedgehog: Auto class to load with (default: from the configuration)"
    )
    made.add_argument("--dtype", type=one_of(DTYPES), metavar="|".join(DTYPES), help="numbers of the converted weights")
    made.add_argument("--overwrite", action="store_true", help="write into a folder that holds a checkpoint")
    made.add_json()
    return made


def run(arguments: list[str]) -> int:
    """Parse, convert, save. Exit codes: 0, 1 for a checkpoint that cannot be converted, 2 for a wrong call."""
    command = parser()
    given = command.parse(arguments)
    output = Path(given["output"])
    if output.exists() and not output.is_dir():
        command.error(f"{output} is a file, not a folder")
    if output.is_dir() and any(output.iterdir()) and not given["overwrite"]:
        command.error(f"{output} is not empty; --overwrite writes into it")
    if given["to"] != "onnx" and output.exists() and output.resolve() == Path(given["source"]).resolve():
        command.error(f"{output} is the checkpoint itself, which the converted one would replace: name another folder")
    if given["to"] not in LINEARIZED and (given["set"] or given["task"]):
        command.error(f"--set and --task belong to --to {' or '.join(LINEARIZED)}")
    begin_work()
    from ..training.model_choice import fitting_values

    fields = {}
    try:
        if given["set"]:
            fields = fitting_values(FAMILIES[given["to"]].config_class(), key_values(given["set"], "--set"), "--set")
    except ValueError as error:
        command.error(str(error))
    say_if_no_folder(given["source"])
    as_json = given.get("json", False)
    with words_aside(as_json):
        result = _convert(given, fields, output)
    files = ", ".join(result["files"])
    show(result, f"{result['class']}, {result['parameters']:,} parameters\n{output}: {files}", as_json)
    return 0


def _convert(given: dict[str, Any], fields: dict[str, Any], output: Path) -> dict[str, Any]:
    import torch

    dtype = getattr(torch, given["dtype"]) if given["dtype"] else None
    if given["to"] in LINEARIZED:
        from ..conversion import linearize

        model = linearize(given["source"], given["to"], task=given["task"], dtype=dtype, **fields)
    elif given["to"] == "onnx":
        from transformers import AutoModelForCausalLM

        from ..hub.loading import load_model

        model = load_model(AutoModelForCausalLM, given["source"], dtype=dtype or torch.float32).eval()
    else:
        from ..conversion.published import load_published

        model = load_published(given["to"], given["source"])
        model = model if dtype is None else model.to(dtype)
    output.mkdir(parents=True, exist_ok=True)
    if given["to"] == "onnx":
        from ..exporting import save_onnx_step

        save_onnx_step(model, output / "step.onnx")
    else:
        model.save_pretrained(output)
    _copy_tokenizer(given["source"], output)
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "output": str(output),
        "files": sorted(path.name for path in output.iterdir() if path.is_file()),
    }


def _copy_tokenizer(source: str, output: Path) -> None:
    """The source's tokenizer beside the model; a checkpoint without one is no error."""
    from ..hub.loading import load_tokenizer

    try:
        load_tokenizer(source).save_pretrained(output)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        print(printable(f"{source} has no tokenizer that could be copied ({reason})"))
