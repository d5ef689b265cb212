"""Names of headers that are Roundhouse's own, for programs that would read no more of the API."""

#: A proxy says so where an error is its own, and no replica's.
PROXYS_OWN = b"x-roundhouse-proxy"
