"""A playable instrument made by a model: sampled notes of one timbre, in tune, and an SFZ file for a sampler."""
