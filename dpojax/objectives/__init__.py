"""What is minimised? Pure functions of arrays."""
