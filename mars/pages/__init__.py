"""What people look at: HTML pages, charts, and pictures of spectrograms."""
