"""HTML pages, charts and pictures of spectrograms."""
