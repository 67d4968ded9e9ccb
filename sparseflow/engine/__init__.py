"""Bytes in memory: the arena, who is in it, and how bundles come from disk. No torch."""
