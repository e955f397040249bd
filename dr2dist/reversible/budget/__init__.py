"""What functions cost, and what a memory budget makes of it."""
