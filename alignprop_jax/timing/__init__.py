"""What `benchmark` times."""
