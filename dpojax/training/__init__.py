"""What is one step, and what is the loop? Knows no algorithm by name."""
