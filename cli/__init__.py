"""Command lines: parse, check, hand over."""
