"""The data: its one schema, safe decoding, and how training reads it."""
