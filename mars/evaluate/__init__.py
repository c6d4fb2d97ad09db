"""Measures of generated and reconstructed notes: pure functions of waveforms and features, no files."""
