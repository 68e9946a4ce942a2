"""`llava submit`: how the tests call it, and what a first run of the template is."""

from collections.abc import Callable

NAME = "llava-train-202611230230"
TRAIN = (
    "submit",
    "tiny",
    "--command",
    "train",
    "--root",
    "s3://bucket/root",
    "--scheduled",
    "2026-11-23T02:30",
)
ORDER = ["GET llava/rayjobs/llava", "LIST llava/rayjobs", "POST llava/rayjobs"]

Command = Callable[..., tuple[int, str, str]]


def last(err: str) -> str:
    return err.strip().splitlines()[-1]
