"""A language model as the teacher: it reads captions and boxes as text and writes as if it saw the picture."""
