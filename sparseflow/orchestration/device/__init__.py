"""Layer steps on a device: what lies there, how bundles come to it, and what it costs."""
