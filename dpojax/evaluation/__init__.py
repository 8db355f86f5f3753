"""Is it better? What is measured of a trained policy, and how sure that is."""
