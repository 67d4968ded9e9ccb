"""Arithmetic on a GPU, in Triton: choosing neurons, giving them device slots, moving and computing them."""
