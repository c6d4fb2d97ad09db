"""Evaluation: sets of notes, the networks that look at them, and what is measured between two sets."""
