"""Pipeline stages that reconstruct their own activations."""
