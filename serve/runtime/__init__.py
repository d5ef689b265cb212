"""Ray Serve applications and the local platform; the only home of ray."""
