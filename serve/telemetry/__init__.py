"""What a running platform tells of itself; it knows neither the protocols nor Ray."""
