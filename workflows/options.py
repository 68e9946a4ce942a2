"""Options that several commands take."""

from typing import Annotated

import typer

Preset = Annotated[str, typer.Argument(metavar="PRESET|FILE", help="A preset's name, or a YAML file.")]
Root = Annotated[str, typer.Option(help="Where artifacts live: a folder or s3://bucket/prefix.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as finetune.epochs=2."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the summary as one JSON object on the last line.")
]
Profile = Annotated[
    bool, typer.Option("--profile", help="Keep a torch profiler trace of a few steps of each stage.")
]
Wait = Annotated[
    bool, typer.Option("--wait", help="Wait where another run makes the same artifact (else: status 5).")
]
