"""Why a model has the replicas that it has: what its load was, what that asked for, and what holds it."""
