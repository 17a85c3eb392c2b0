"""qwenspec: one YAML spec of a Qwen variant in, a standalone implementation out, on any backend."""

__version__ = "0.1.0"
