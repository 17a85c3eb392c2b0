"""What a backend is, how one is found, and how files are written."""
