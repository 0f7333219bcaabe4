"""Who is up, and where."""
