"""A full-precision checkpoint to our int8 or int4 layout (docs/quantization.md), streamed. Needs NumPy."""
