"""The networks that an evaluation listens with, and the cache of what they say."""
