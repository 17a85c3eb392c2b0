"""Kernels: functions on Relax tensors, on CPUs each with a scheduled TIR function behind it."""
