"""`dr2dist bench`: what ways to train cost in memory and time, side by side on one machine."""
