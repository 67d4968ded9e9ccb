"""The weight server: owns the weights of one host and serves them to inference processes. Never imports torch."""
