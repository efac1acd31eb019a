"""A pretrained causal Transformer into a Hedgehog model: its weights, and which of its layers keep softmax attention."""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..hub.loading import load_tokenizer
from ..modeling.hedgehog.configuration_hedgehog import HedgehogConfig
from ..modeling.hedgehog.hosts import FITTING
from ..modeling.hedgehog.modeling_hedgehog import HedgehogPreTrainedModel
from ..modeling.kernels.tracing import can_read_values

MARK = ".hedgehog."
ROWS, LENGTH = 4, 512  # calibration text if none is given
LABEL_FIELDS = ("id2label", "label2id", "problem_type")


def into_hedgehog(teacher: PreTrainedModel, student_class, options: dict[str, Any], calibration=None, source=None):
    """`teacher` as a `student_class`, with fields `options` of its configuration; `source` is what the teacher came from.

    Raises:
        ValueError: a host that does not fit, an option out of its range, too little text for calibration.
    """
    options = dict(options)
    share = automatic_share(options.get("softmax_layers"))
    if share is not None:
        options["softmax_layers"] = []
    elif calibration is not None:
        raise ValueError(
            '`calibration` is text to choose layers on, which needs `softmax_layers="auto:25%"`: leave it out'
        )
    if student_class.__name__.endswith("ForSequenceClassification"):
        options = {name: getattr(teacher.config, name, None) for name in LABEL_FIELDS} | options
    matrix = teacher.get_output_embeddings()
    options.setdefault("lm_head_bias", getattr(matrix, "bias", None) is not None)
    options.setdefault("tie_word_embeddings", bool(getattr(teacher.config, "tie_word_embeddings", False)))
    student = student_class(HedgehogConfig(host_config=teacher.config, **options))
    nn.Module.to(student, dtype=teacher.dtype, device=teacher.device)
    carry_over(teacher, student)
    check_same_inside_the_window(teacher, student)
    if share is not None:
        count = round(share * student.config.num_hidden_layers)
        if count:
            ids = calibration_ids(calibration, teacher, source, student.config.window)
            student.set_softmax_layers(choose_softmax_layers(teacher, student, ids, count))
    return student


def automatic_share(softmax_layers) -> float | None:
    """0.25 of "auto:25%"; None where layers are named.

    Raises:
        ValueError: another word, or a share outside 0 to 100%.
    """
    if not isinstance(softmax_layers, str):
        return None
    found = re.fullmatch(r"auto:(-?\d+(?:\.\d+)?)%", softmax_layers)
    if found is None or not 0 <= float(found[1]) < 100:
        raise ValueError(
            f'`softmax_layers` is {softmax_layers!r}, expected a list of layers, or "auto:25%" with a share from 0 to below 100%'
        )
    return float(found[1]) / 100


@torch.no_grad()
def carry_over(teacher: PreTrainedModel, student: HedgehogPreTrainedModel) -> None:
    """Copy every weight to where the student has it; only what Hedgehog adds may be left over.

    Raises:
        ValueError: weights that the student has no place for, or lacks.
    """
    headed = hasattr(student, "model")
    target = student.model.host if headed else student.host
    body = teacher.base_model if headed else teacher
    missing, unexpected = target.load_state_dict(body.state_dict(), strict=False)
    missing = [name for name in missing if MARK not in f".{name}"]
    carried = {id(parameter) for parameter in body.parameters()}
    for name, given in (("lm_head", teacher.get_output_embeddings()), ("score", getattr(teacher, "score", None))):
        if not hasattr(student, name):
            continue
        if given is None:
            missing.append(name)
        else:
            getattr(student, name).load_state_dict(given.state_dict())
            carried |= {id(parameter) for parameter in given.parameters()}
    unexpected += [name for name, parameter in teacher.named_parameters() if id(parameter) not in carried]
    if missing or unexpected:
        raise ValueError(
            f"the weights of {type(teacher).__name__} do not fit: missing {missing[:5]}, without a place {unexpected[:5]}. "
            f"Hosts that fit: {FITTING}"
        )
    student.tie_weights()


@torch.no_grad()
def check_same_inside_the_window(teacher: PreTrainedModel, student: HedgehogPreTrainedModel) -> None:
    """Refuse a host in which something else than softmax attention was replaced, too: a text inside the window shows it.

    Raises:
        ValueError: with how far the predictions differ.
    """
    length = min(student.config.window, 8)
    ids = torch.arange(length, device=teacher.device)[None] * 7 % int(teacher.config.vocab_size)
    if teacher.device.type == "meta" or not can_read_values(ids):
        return
    training = teacher.training
    pad, student.config.pad_token_id = student.config.pad_token_id, None  # the ids are all text here
    padded, teacher.config.pad_token_id = teacher.config.pad_token_id, None
    try:
        wanted, found = (model.eval()(input_ids=ids, use_cache=False)[0].float() for model in (teacher, student))
    finally:
        teacher.train(training)
        student.config.pad_token_id, teacher.config.pad_token_id = pad, padded
    least = {torch.float64: 1e-4, torch.float32: 1e-3}.get(teacher.dtype, 0.1)
    error, scale = (found - wanted).abs().max().item(), wanted.abs().max().item()
    if not error <= least * max(scale, 1e-3):
        raise ValueError(
            f"{type(teacher).__name__} predicts otherwise with Hedgehog in it, already inside the window (by {error:.3g} of at "
            f"most {scale:.3g}): its attention or its head is more than softmax attention and a matrix. Hosts that fit: {FITTING}"
        )


def calibration_ids(given, teacher: PreTrainedModel, source, window: int) -> torch.Tensor:
    """Token ids (N, T) on the teacher's device, of what the caller gave or of speeches in the package.

    Raises:
        ValueError: too little text, texts of a model in memory that has no tokenizer, ids outside of the vocabulary.
    """
    if isinstance(given, torch.Tensor):
        ids = given
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(
                f"`calibration` has shape {tuple(ids.shape)} and dtype {ids.dtype}, expected token ids (texts, length)"
            )
    else:
        ids = _tokenized(given, teacher, source)
    if not ids.numel() or ids.shape[1] <= 2 * window:
        raise ValueError(
            f"`calibration` has {ids.shape[0]} rows of {ids.shape[1]} tokens, which is too little: rows of more than twice "
            f"the window of {window} are expected, because inside it every layer is softmax attention anyway"
        )
    vocabulary = teacher.config.vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"`calibration` holds {int(ids.max())}, expected token ids 0 to {vocabulary - 1}")
    return ids.long().to(teacher.device)


def _tokenized(texts: Sequence[str] | None, teacher: PreTrainedModel, source) -> torch.Tensor:
    """Texts one after another, cut into rows of equal length."""
    if isinstance(texts, str):
        texts = [texts]
    if texts is None:
        from ..training.text_data import EXCERPT_FOLDER

        texts = [file.read_text(encoding="utf-8") for file in sorted(EXCERPT_FOLDER.glob("*.txt"))[-ROWS:]]
    name = getattr(teacher.config, "name_or_path", "") if isinstance(source, PreTrainedModel) else source
    if not name:
        raise ValueError(
            "`calibration` needs token ids (N, T) for a model in memory that does not say where its tokenizer is: "
            'give `tokenizer(texts, return_tensors="pt", ...).input_ids`'
        )
    tokenizer = load_tokenizer(name)
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids[: LENGTH * ROWS]]
    length = min(LENGTH, len(ids), getattr(teacher.config, "max_position_embeddings", LENGTH))
    rows = min(ROWS, len(ids) // max(1, length))
    return torch.tensor(ids[: rows * length]).view(rows, -1)


@torch.no_grad()
def choose_softmax_layers(teacher: PreTrainedModel, student, ids: torch.Tensor, count: int) -> list[int]:
    """The `count` layers whose being linear, each alone, moves the predictions furthest from the teacher's; prints the table.

    The measure is the mean of KL(teacher || student) over tokens that see more than the window. Ties go to the earlier layer.
    """
    if not hasattr(student, "lm_head"):
        raise ValueError(
            f"`softmax_layers` of the form 'auto:25%' compares predicted words, and {type(student).__name__} predicts none: "
            "choose on the causal language model, and name the layers"
        )
    layers, window = range(student.config.num_hidden_layers), student.config.window
    measured = [0.0] * len(layers)
    training = teacher.training
    teacher.eval()
    student.eval()
    try:
        for row in ids:
            wanted = teacher(input_ids=row[None], use_cache=False).logits[0, window:].float().log_softmax(-1)
            for layer in layers:
                student.set_softmax_layers([i for i in layers if i != layer] if len(layers) > 1 else [])
                found = student(input_ids=row[None], use_cache=False).logits[0, window:].float().log_softmax(-1)
                kl = F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()
                measured[layer] += kl.item() / len(ids)
    finally:
        teacher.train(training)
    chosen = sorted(sorted(layers, key=lambda i: -measured[i])[:count])
    print(table_of(measured, chosen, ids))
    student.softmax_choice = {"kl": measured, "softmax_layers": chosen, "tokens": ids.numel()}
    return chosen


def table_of(measured: list[float], chosen: list[int], ids: torch.Tensor) -> str:
    """Layer by layer, the KL when it alone is linear, and what it becomes."""
    lines = [f"KL of the predictions when a layer alone is linear, {ids.shape[0]} texts of {ids.shape[1]} tokens"]
    lines += [f"{'layer':>5}  {'KL, nats a token':>16}  becomes"]
    for layer, kl in enumerate(measured):
        lines.append(f"{layer:>5}  {kl:>16.3g}  {'softmax' if layer in chosen else 'linear'}")
    return "\n".join(lines)


__all__ = ["automatic_share", "calibration_ids", "choose_softmax_layers", "into_hedgehog"]
