"""What a fidelity costs in quality and spares in bytes, measured on text."""
