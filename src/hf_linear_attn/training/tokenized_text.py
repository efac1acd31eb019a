"""From documents to equal blocks of token ids: a byte-level BPE trained on the text itself, ids kept in one compact
file.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..modeling.shared.files.whole_files import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .text_data import TextData

PAD, BOS, EOS, MASK = "<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>"
SMALLEST_VOCABULARY = 256 + 3
TOKENIZER_DIGEST = "tokenizer_digest"


def cache_folder() -> Path:
    """Where tokenizers and token ids are kept: $HF_LINEAR_ATTN_CACHE, else hf-linear-attn in the user's cache
    folder.
    """
    named = os.environ.get("HF_LINEAR_ATTN_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named).expanduser() if named else base / "hf-linear-attn"


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int, for_encoder: bool = False) -> "PreTrainedTokenizerFast":
    """Byte-level BPE of `vocab_size` pieces (special ones included), which can spell any text.
    Pads on the left, as generation wants.

    for_encoder: has <|mask|>, too, frames every text by <|bos|> and <|eos|> of itself, and pads on the right.
    Every text of the training split, and no other, should be given:
    the held-out text is then new to the tokenizer, too.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be at least {SMALLEST_VOCABULARY} (256 bytes and 3 special tokens), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, *([MASK] if for_encoder else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    roles = {}
    if for_encoder:
        roles = {"mask_token": MASK, "cls_token": BOS, "sep_token": EOS}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}", pair=f"{BOS} $A {EOS} $B {EOS}", special_tokens=[(BOS, 1), (EOS, 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right" if for_encoder else "left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **roles,
    )


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of each split in one run (documents framed by <|bos|> and <|eos|>), and the size of the text they
    stand for.

    ids: split -> (tokens,) integer array. num_bytes: split -> bytes of the text, so that losses can be given in bits
    per byte.
    """

    ids: dict[str, np.ndarray]
    num_bytes: dict[str, int]
    vocab_size: int

    def bits_per_byte(self, split: str, loss: float) -> float:
        """Mean loss in nats per token -> bits per byte of the text, which compares models with different tokenizers."""
        return loss / float(np.log(2)) * len(self.ids[split]) / self.num_bytes[split]

    def save(self, path: Path, **more: np.ndarray) -> None:
        """Write one compressed .npz: ids as uint16 (uint32 for vocabularies above 65536), and more arrays under their names.
        Readers need NumPy alone.
        """
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        arrays = {f"ids_{split}": ids.astype(dtype) for split, ids in self.ids.items()}
        arrays |= {f"bytes_{split}": np.array(count) for split, count in self.num_bytes.items()}
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(part: Path) -> None:
            with part.open("wb") as file:  # NumPy would add its ending to another name
                np.savez_compressed(file, vocab_size=np.array(self.vocab_size), **arrays, **more)

        write_whole(path, write)

    @classmethod
    def load(cls, path: Path) -> "TokenizedText":
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            splits = [key.removeprefix("ids_") for key in arrays.files if key.startswith("ids_")]
            return cls(
                {split: arrays[f"ids_{split}"] for split in splits},
                {split: int(arrays[f"bytes_{split}"]) for split in splits},
                int(arrays["vocab_size"]),
            )


def tokenize_documents(data: "TextData", tokenizer: "PreTrainedTokenizerFast") -> TokenizedText:
    """Encode every document of every split, framed by the tokenizer's bos and eos tokens where it has them."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids, num_bytes = {}, {}
    for split, documents in data.documents.items():
        texts = [text for text in documents["text"] if text]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        framed = [np.array([*start, *document, *end], dtype=np.uint32) for document in encoded]
        ids[split] = np.concatenate(framed) if framed else np.zeros(0, dtype=np.uint32)
        num_bytes[split] = sum(len(text.encode()) for text in texts)
    return TokenizedText(ids, num_bytes, len(tokenizer))


def prepare_text(
    data: "TextData", vocab_size: int, tokenizer_name: str | None = None, for_encoder: bool = False
) -> tuple["PreTrainedTokenizerFast", TokenizedText]:
    """Tokenizer and token ids of `data`; both come from the cache when the same text was prepared before.

    tokenizer_name: folder or Hub name of an existing tokenizer;
    without it a BPE of `vocab_size` is trained on the training split (for_encoder: with a mask token).
    """
    from transformers import PreTrainedTokenizerFast

    from ..hub.loading import load_tokenizer

    kind = [2, vocab_size, tokenizer_name, *(["encoder"] if for_encoder else [])]
    digest = hashlib.sha256(json.dumps(kind).encode())
    num_bytes = dict.fromkeys(data.documents, 0)
    for split, documents in data.documents.items():
        digest.update(split.encode())
        for text in documents["text"]:
            digest.update(text.encode() + b"\0")
            num_bytes[split] += len(text.encode())
    folder = cache_folder() / "text" / digest.hexdigest()[:16]
    ids_file = folder / "ids.npz"
    if tokenizer_name is not None:
        # A tokenizer can change under its name, so only its own training is worth a cache.
        tokenizer = load_tokenizer(tokenizer_name)
        return tokenizer, tokenize_documents(data, tokenizer)
    if ids_file.exists():
        try:
            kept = TokenizedText.load(ids_file)
            with np.load(ids_file) as arrays:
                if str(arrays[TOKENIZER_DIGEST]) != _digest_of_tokenizer(folder) or kept.num_bytes != num_bytes:
                    raise ValueError("the tokens are not those of this text and tokenizer")
            return PreTrainedTokenizerFast.from_pretrained(folder), kept
        except Exception:  # whatever a broken file makes NumPy or the tokenizers library raise, both can be made again
            print(f"the tokenizer or the tokens of this text in {folder} are damaged: making them again")
            ids_file.unlink()
    tokenizer = train_bpe_tokenizer(data.documents["train"]["text"], vocab_size, for_encoder)
    text = tokenize_documents(data, tokenizer)
    tokenizer.save_pretrained(folder)
    # Last: its presence says that the folder is complete.
    text.save(ids_file, **{TOKENIZER_DIGEST: np.array(_digest_of_tokenizer(folder))})
    return tokenizer, text


def _digest_of_tokenizer(folder: Path) -> str:
    """Digest of the files of the tokenizer in the cache, to which the tokens beside it belong."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.json")):
        digest.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


class TokenBlocks(torch.utils.data.Dataset):
    """A run of token ids cut into blocks of equal length, in order; the rest that fills no block is left out.

    max_tokens keeps that many tokens at most, in blocks taken at equal distances over the whole run:
    a fair sample of a long split.
    """

    def __init__(self, ids: np.ndarray, block_length: int, max_tokens: int | None = None, name: str = "text"):
        count = len(ids) // block_length
        if count == 0:
            raise ValueError(
                f"the {name} split has {len(ids)} tokens, fewer than one block of block_length={block_length}: "
                "give a smaller block_length or more text"
            )
        self.blocks = ids[: count * block_length].reshape(count, block_length)
        if max_tokens is not None and max_tokens < self.blocks.size:
            kept = max(1, max_tokens // block_length)
            self.blocks = self.blocks[np.linspace(0, count - 1, kept).round().astype(int)]

    def keep_multiple_of(self, rows: int) -> "TokenBlocks":
        """Leave out the last blocks that would not fill a step of `rows` blocks; returns self."""
        kept = len(self.blocks) // rows * rows
        if kept == 0:
            raise ValueError(
                f"the training text has {len(self.blocks)} blocks, fewer than the {rows} of one step (batch_size times "
                "accumulate): give smaller ones, a smaller block_length or more text"
            )
        self.blocks = self.blocks[:kept]
        return self

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.blocks[index].astype(np.int64))
        labels = block.clone()
        # The first token follows none. Trainer counts the targets itself, and for a class whose name does
        # not end in ForCausalLM (GPT2LMHeadModel) it would count this one, too: losses (T - 1)/T times too small.
        labels[0] = -100
        return {"input_ids": block, "labels": labels}
