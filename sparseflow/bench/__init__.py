"""Decode speed beside other programs, on the same model under the same conditions, and beside the machine's limits."""
