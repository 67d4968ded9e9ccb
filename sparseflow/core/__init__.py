"""Configuration, the weight source seam, and the store seen from a process that has torch."""
