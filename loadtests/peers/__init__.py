"""Roundhouse beside its peers: the same models, inputs and machine, in rounds that take turns."""
