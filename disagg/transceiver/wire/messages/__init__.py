"""Messages between workers and to the router, as data."""
