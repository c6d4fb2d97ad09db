"""Training: the loop (`loop`), and what each stage does in a step (`tokenizer`, `var`)."""
