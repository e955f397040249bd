"""How one residual function is run, twice alike, in slices, and differentiated."""
