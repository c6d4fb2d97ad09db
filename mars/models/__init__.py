"""Networks: tokenizer (with its quantizer), VAR, discriminator."""
