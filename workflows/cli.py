"""The command `llava`."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llava.errors import LlavaError, Preempted

app = typer.Typer(
    name="llava",
    help="Make your own LLaVA: photos in, a registered vision-language model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Preset = Annotated[str, typer.Argument(metavar="PRESET|FILE", help="A preset's name, or a YAML file.")]
Root = Annotated[str, typer.Option(help="Where artifacts live: a folder or s3://bucket/prefix.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as finetune.epochs=2."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the summary as one JSON object on the last line.")
]
Wait = Annotated[
    bool, typer.Option("--wait", help="Wait where another run makes the same artifact (else: status 5).")
]


@app.command()
def train(
    preset: Preset, root: Root = "runs", set_: Set = None, json_: AsJson = False, wait: Wait = False
) -> None:
    """Run the whole workflow; what is finished already is found again, what was cut short is resumed."""
    _run(preset, root, set_, json_, wait, "register")


def _stage_command(stage: str, does: str) -> None:
    def command(
        preset: Preset, root: Root = "runs", set_: Set = None, json_: AsJson = False, wait: Wait = False
    ) -> None:
        _run(preset, root, set_, json_, wait, stage)

    app.command(stage, help=f"{does} Whatever it needs that is not finished runs first.")(command)


for _stage, _does in {
    "backbones": "Join a vision tower and a language model into a stock LLaVA folder.",
    "shard": "Turn photos, captions and boxes into Parquet shards.",
    "instruct": "Write conversations from captions and boxes.",
    "pretrain": "Stage 1: train the projector.",
    "finetune": "Stage 2: train the projector and the language model.",
    "evaluate": "Answer held-out questions and score the answers.",
    "register": "Register the model, as champion or challenger.",
}.items():
    _stage_command(_stage, _does)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask about the picture.")],
    model: Annotated[str, typer.Option(help="A model's artifact, folder or models:/NAME@ALIAS.")],
    image: Annotated[Path, typer.Option(help="The picture.")],
    root: Root = "runs",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens after which the answer is cut.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Ask a model about a picture."""
    from workflows.ask import answer

    print(answer(question, model, image, root, max_new_tokens, device))


@app.command()
def show(
    uri: Annotated[str, typer.Argument(help="An artifact: a folder or s3://bucket/prefix/component/digest.")],
) -> None:
    """Print what an artifact holds and where it comes from."""
    from workflows.show import show as show_artifact

    show_artifact(uri)


@app.command()
def prune(
    root: Root = "runs",
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
    fresh: Annotated[
        float,
        typer.Option(
            min=0, help="Minutes for which a finished artifact stays anyway: a run may need it next."
        ),
    ] = 10,
) -> None:
    """List the artifacts that no registered model comes from."""
    from datetime import timedelta

    from workflows.prune import prune as prune_root

    prune_root(root, yes, timedelta(minutes=fresh))


def _run(preset: str, root: str, overrides: list[str] | None, as_json: bool, wait: bool, until: str) -> None:
    from workflows import config as configs

    config = configs.load(preset, overrides or [])
    from workflows import train as workflow
    from workflows.summary import show as show_summary

    workspace = workflow.open_workspace(config.name, root, wait)
    summary = workflow.run(config, workspace, until)
    show_summary(summary, workspace)
    if as_json:
        print(json.dumps(summary.as_json()), flush=True)


def _terminated(number: int, frame: Any) -> None:
    raise Preempted("stopped by SIGTERM; the same command goes on from the last checkpoint")


def main() -> None:
    """Entry point: a failure is one line on standard error and its own exit status (design.md)."""
    from components import cluster

    cluster.prepare()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except LlavaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
