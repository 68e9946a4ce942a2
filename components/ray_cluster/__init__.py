"""The Ray cluster that components run on, and work spread over it."""
