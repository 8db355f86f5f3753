"""What each family's config.json and tensors are called: rows of one table."""
