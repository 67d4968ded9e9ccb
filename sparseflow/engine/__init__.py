"""Bytes in memory, no torch: the resident shards of a store."""
