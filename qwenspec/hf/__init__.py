"""Hugging Face's config.json to a spec and back, and the tokenizer's files. No tensor library is imported."""
