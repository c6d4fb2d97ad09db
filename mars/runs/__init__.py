"""The folder of a run: checkpoints, log, samples and report."""
