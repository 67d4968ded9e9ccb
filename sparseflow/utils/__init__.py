"""Small helpers around torch."""
