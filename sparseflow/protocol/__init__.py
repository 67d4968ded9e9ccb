"""Bytes on the wire between inference processes and a weight server. Standard library and msgpack only."""
