"""Who is alive and who holds what."""
