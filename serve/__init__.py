"""Roundhouse: many models on few GPUs, one declaration from laptop to cluster."""

__version__ = "0.1.0"
