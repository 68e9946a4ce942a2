"""One stage each: a component takes artifacts and settings and makes one artifact."""
