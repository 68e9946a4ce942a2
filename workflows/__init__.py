"""Which components run, in which order, on what; and the command line."""
