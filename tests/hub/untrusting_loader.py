"""Loads a folder that carries code without trusting it, and prints what came of each attempt, one line each.

python -S untrusting_loader.py FOLDER
"""

import sys

from transformers import AutoConfig, AutoModel

for auto_class in (AutoConfig, AutoModel):
    for trust in ({}, {"trust_remote_code": False}):
        try:
            auto_class.from_pretrained(sys.argv[1], **trust)
            print("outcome: loaded")
        except Exception as error:
            print("outcome:", type(error).__name__, " ".join(str(error).split()))
