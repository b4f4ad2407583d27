"""Training: the step in the paper's order, and the loop around it."""
