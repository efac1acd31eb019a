"""Training on real text: data, tokenizer, options, a Trainer run with a learning curve, resuming."""
