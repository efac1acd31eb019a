"""What the LEAP in the package looks at in a speech that it has not seen (Lincoln, 1863), as a picture.

    python docs/scripts/focus_in_a_speech.py

writes docs/images/focus_in_a_speech.png.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_linear_attn import PACKAGED_MODEL
from hf_linear_attn.explain import importance
from hf_linear_attn.training.text_data import EXCERPT_FOLDER

SPEECH = "1863-Lincoln-1.txt"  # years in 3 are the test split
CHARACTERS = 900
IMAGE = Path(__file__).parents[1] / "images" / "focus_in_a_speech.png"


def main() -> None:
    """Draw the map of the first lines."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(PACKAGED_MODEL).eval(),
        AutoTokenizer.from_pretrained(PACKAGED_MODEL),
    )
    text = (EXCERPT_FOLDER / SPEECH).read_text()[:CHARACTERS].rpartition(" ")[0]
    importance(model, tokenizer, text).draw().savefig(IMAGE, dpi=120)
    print(IMAGE)


if __name__ == "__main__":
    main()
