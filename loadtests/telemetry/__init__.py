"""What it costs to be watched: the same replica with and without metrics and traces, in one run."""
