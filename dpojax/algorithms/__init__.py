"""What does it train, and how? One algorithm a file, all of one face."""
