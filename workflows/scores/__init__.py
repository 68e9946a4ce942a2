"""`llava score` and `llava compare`."""
