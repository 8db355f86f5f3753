"""Which machine, which processes, and what do they share?"""
