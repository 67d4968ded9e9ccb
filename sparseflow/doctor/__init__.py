"""What `sparseflow doctor` looks at: this machine, what is installed, what is stored here and what runs."""
