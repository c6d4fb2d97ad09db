"""The networks that turn notes into features for the metrics, and the cache of these features."""
