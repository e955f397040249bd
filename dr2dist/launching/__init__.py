"""From the command to ranks: who starts them, tells of their ends, and ends them."""
