"""Proof: the float64 reference, and what compares backends with it and with each other."""
