"""The GPU's driver without torch: page-locking, memory and events of several processes, and trials of both."""
