"""The metrics, one a file: what it computes, and how an evaluation asks for it."""
