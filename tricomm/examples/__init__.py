"""Complete scripts to start from, each run by a test; they import what a user imports, and nothing imports them."""
