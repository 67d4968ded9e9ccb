"""Decisions per token: which neurons, dense or sparse, from where."""
