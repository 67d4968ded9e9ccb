"""Small helpers that know nothing of the rest: sizes, logs, bars, command lines, text of tokens, memory."""
