"""Measurements beside peers and the machine's limits; README.md says how to read them."""
