"""How states are kept and stepped: exactly on a fixed-point grid, or in floating point."""
