"""The command `llava`."""

import contextlib
import json
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llava.errors import Terminated
from workflows import failures
from workflows.options import AsJson, Preset, Profile, Root, Set, Wait
from workflows.scores.cli import compare, score
from workflows.stages import STAGES, Stage, training_stages

app = typer.Typer(
    name="llava",
    help="Make your own LLaVA: photos in, a registered vision-language model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def train(
    preset: Preset,
    root: Root = "runs",
    set_: Set = None,
    json_: AsJson = False,
    wait: Wait = False,
    profile: Profile = False,
) -> None:
    """Run the whole workflow; what is finished already is found again, what was cut short is resumed."""
    _run(preset, root, set_, json_, wait, profile=profile)


def _stage_command(stage: Stage) -> None:
    def command(
        preset: Preset,
        root: Root = "runs",
        set_: Set = None,
        json_: AsJson = False,
        wait: Wait = False,
        profile: Profile = False,
    ) -> None:
        _run(preset, root, set_, json_, wait, stage.name, profile)

    app.command(stage.name, help=f"{stage.does} Whatever it needs that is not finished runs first.")(command)


@app.command()
def instruct(
    preset: Preset,
    root: Root = "runs",
    set_: Set = None,
    json_: AsJson = False,
    wait: Wait = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only print the prompts about three photos, and tokens, time and cost."
        ),
    ] = False,
) -> None:
    """Write conversations from captions and boxes. Whatever it needs that is not finished runs first."""
    if not dry_run:
        return _run(preset, root, set_, json_, wait, "instruct")
    from workflows import config as configs
    from workflows.dry_run import dry_run as show_what_it_takes

    show_what_it_takes(configs.load(preset, set_ or []), root, wait)


for _stage in STAGES:
    # `instruct` has a command of its own above.
    if _stage.does and _stage.name != "instruct":
        _stage_command(_stage)


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
    from components.contract import tell
    from workflows.ask import answer

    tell(answer(question, model, image, root, max_new_tokens, device))


@app.command()
def show(
    uri: Annotated[str, typer.Argument(help="An artifact: a folder or s3://bucket/prefix/component/digest.")],
) -> None:
    """Print what an artifact holds and where it comes from; its report is saved here."""
    from workflows.show import show as show_artifact

    show_artifact(uri)


app.command()(score)
app.command()(compare)


@app.command()
def submit(
    preset: Annotated[
        str | None, typer.Argument(metavar="PRESET", help="A preset; default: the template's.")
    ] = None,
    command: Annotated[
        Literal["train", "retrain"] | None, typer.Option(help="What runs; default: what the template says.")
    ] = None,
    root: Annotated[str | None, typer.Option(help="s3://bucket/prefix; default: the template's.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Where new data comes in, for retrain.")] = None,
    set_: Set = None,
    template: Annotated[str, typer.Option(help="The suspended RayJob that is copied.")] = "llava",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Where it is.")] = "llava",
    context: Annotated[str | None, typer.Option(help="Of the kubeconfig.")] = None,
    scheduled: Annotated[
        str | None,
        typer.Option(metavar="MINUTE|job/NAME", help="The run's minute, in its name; default: now."),
    ] = None,
    if_new: Annotated[bool, typer.Option("--if-new", help="Only if a drop holds something new.")] = False,
    allow_parallel: Annotated[
        bool, typer.Option("--allow-parallel", help="Also while another run is on (else: status 5).")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow states and log until it ends.")] = False,
) -> None:
    """Start a run on Kubernetes: a copy of the template RayJob, once per minute and name."""
    from components.contract import tell
    from workflows.kubernetes import submit as submitting
    from workflows.kubernetes.api import Cluster

    request = submitting.Request(
        command, preset, root, drop or (), set_ or (), template, scheduled, if_new, allow_parallel, watch
    )
    if name := submitting.submit(request, Cluster(namespace, context)):
        tell(name)


@app.command()
def retrain(
    preset: Preset,
    drop: Annotated[list[str], typer.Option(help="Where new data comes in: a folder or s3://; repeat.")],
    root: Root = "runs",
    set_: Set = None,
    json_: AsJson = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait while another retraining of the root is on (else: status 5).")
    ] = False,
) -> None:
    """Train on new drops: old and new data, the gate against the champion; nothing new is status 0 and no run."""
    from workflows import config as configs

    config = configs.load(preset, set_ or [])
    from workflows import train as workflow
    from workflows.retraining import retrain as retraining
    from workflows.summary import show as show_summary

    done = retraining.retrain(config, root, drop, wait)
    if done.summary is not None:
        show_summary(done.summary, workflow.open_workspace(config.name, root))
    if json_:
        print(json.dumps(done.as_json()), flush=True)


By = Annotated[str | None, typer.Option(help="Who decides; default: the user's name here.")]
Reason = Annotated[str, typer.Option(help="Why; it stays with the version.")]


@app.command()
def promote(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The registered model.")],
    version: Annotated[str, typer.Argument(metavar="VERSION", help="The version that becomes champion.")],
    root: Root = "runs",
    by: By = None,
    reason: Reason = "",
) -> None:
    """Make a version the champion by hand."""
    from workflows import promote as promoting

    promoting.promote(name, version, root, by, reason)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The registered model.")],
    root: Root = "runs",
    by: By = None,
    reason: Reason = "",
) -> None:
    """Make the champion before this one the champion again."""
    from workflows import promote as promoting

    promoting.rollback(name, root, by, reason)


@app.command()
def prune(
    root: Root = "runs",
    yes: Annotated[bool, typer.Option("--yes", help="Move what is listed to trash/.")] = False,
    fresh: Annotated[
        float,
        typer.Option(
            min=0, help="Minutes for which a finished artifact stays anyway: a run may need it next."
        ),
    ] = 10,
    keep_days: Annotated[
        float, typer.Option(min=0, help="Days for which they lie in trash/; 0 deletes at once.")
    ] = 7,
    gone: Annotated[
        list[str] | None,
        typer.Option(help="NAME/VERSION that you deleted from the registry yourself; repeat."),
    ] = None,
    restore: Annotated[
        str, typer.Option(metavar="COMPONENT/DIGEST", help="Bring one back from trash/, and nothing else.")
    ] = "",
) -> None:
    """List the artifacts that nothing refers to: no registered model, no drop, no version of the dataset."""
    from datetime import timedelta

    from workflows import prune as pruning

    if restore:
        pruning.restore(root, restore)
    else:
        pruning.prune(root, yes, timedelta(minutes=fresh), keep_days, gone or ())


@app.command()
def estimate(
    preset: Preset,
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs.")] = 8,
    gpu: Annotated[str, typer.Option(help="Their kind, such as a100-80g, h100-80g, h200-141g.")] = "h100-80g",
    mfu: Annotated[float, typer.Option(help="Share of the peak that training is taken to reach.")] = 0.4,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of one GPU, in any currency.")] = None,
    set_: Set = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Say what each stage needs on these GPUs, how long it takes, and how to run it. Nothing is fetched."""
    from workflows.estimate import run

    run(preset, set_ or [], gpus, gpu, mfu, price_per_hour, json_)


def _run(
    preset: str,
    root: str,
    overrides: list[str] | None,
    as_json: bool,
    wait: bool,
    until: str = "",
    profile: bool = False,
) -> None:
    from workflows import config as configs

    traced = [f"{stage.name}.profile=true" for stage in training_stages()] if profile else []
    config = configs.load(preset, [*traced, *(overrides or [])])
    from workflows import train as workflow
    from workflows.summary import show as show_summary

    workspace = workflow.open_workspace(config.name, root, wait)
    summary = workflow.run(config, workspace, until)
    show_summary(summary, workspace)
    if as_json:
        print(json.dumps(summary.as_json()), flush=True)


_STOPS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP (a closed terminal)"}


def _terminated(number: int, frame: Any) -> None:
    what = _STOPS[signal.Signals(number)]
    _forget_closed_terminals()
    raise Terminated(f"stopped by {what}; the same command goes on from the last checkpoint")


def _forget_closed_terminals() -> None:
    """What would be written to a terminal that is gone goes nowhere; saving must not fail at it."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def _listen(handler: Any) -> None:
    """Give the signals that stop a command to `handler`."""
    for number in _STOPS:
        # Where the shell has it ignored, as in the background of a script or under nohup, it stays so.
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def main() -> None:
    """Entry point: a failure is one line on standard error and its own exit status."""
    from components.ray_cluster import connection

    connection.prepare()
    _listen(_terminated)
    try:
        try:
            app()
        except SystemExit:
            failures.flush()
            raise
    except SystemExit:
        raise
    except BaseException as error:
        # From here on the command leaves: another signal cannot make it leave sooner.
        _listen(signal.SIG_IGN)
        status = failures.tell(error)
        connection.leave(status)
        sys.exit(status)


if __name__ == "__main__":
    main()
