"""Arithmetic: bounds and the sparse MLP on a CPU, each with a slow twin."""
