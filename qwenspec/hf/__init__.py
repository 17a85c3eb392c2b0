"""Hugging Face's config.json to a spec and back. No tensor library is imported."""
