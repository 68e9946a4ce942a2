"""Pages for people: HTML and Markdown in which text stays text."""
