"""The model that comes with the package."""

from pathlib import Path

# A LEAP of two million parameters with its tokenizer, trained on the presidents' speeches by model_cards/tiny_leap.py: what the
# commands take where no checkpoint is named, and `AutoModelForCausalLM.from_pretrained(hf_linear_attn.PACKAGED_MODEL)` loads.
PACKAGED_MODEL = str(Path(__file__).with_name("tiny_leap"))
