"""A host for each test, with a runtime directory of its own, and what is served there."""

from own_host import demo_store, dense_ids, host, line, pytest_runtest_makereport, session

__all__ = ["demo_store", "dense_ids", "host", "line", "pytest_runtest_makereport", "session"]
