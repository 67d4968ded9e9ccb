"""Bytes on disk: the manifest, the file format of shards, and the codes that predictors read. No torch."""
