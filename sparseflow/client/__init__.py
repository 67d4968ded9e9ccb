"""The seam over sockets: a weight server's memory, seen from an inference process."""
