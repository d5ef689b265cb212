"""Measurements of the whole: against the peers, and under load."""
