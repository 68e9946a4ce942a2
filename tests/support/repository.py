"""Where the tests find the repository and what lies beside it."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY / ".." / "shared"
"""Real photos and the custom resources' schemas; not part of the repository."""
