"""What somebody else wrote: files, templates, patterns, functions. Read and run with bounds."""
