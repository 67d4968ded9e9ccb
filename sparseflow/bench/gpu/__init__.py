"""The GPU benchmark: its cases, each in a process of its own, the programs beside SparseFlow, and the report."""
