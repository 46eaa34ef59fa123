"""`mit-semseg selftest`: break running jobs on purpose, and measure what is lost."""
