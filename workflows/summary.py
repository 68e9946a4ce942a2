"""What a person reads at the end of a run, and what to type next."""

from components.contract import Workspace, say
from workflows.train import Summary


def show(summary: Summary, workspace: Workspace) -> None:
    """Artifacts, scores, the registered version and next commands, on standard error."""
    say("")
    for name, uri in summary.artifacts.items():
        took = "found again" if name in summary.reused else f"{summary.seconds[name]:.0f} s"
        say(f"{name:10} {took:>12}  {uri}")
    overall = {name: value for name, value in summary.scores.items() if name.count("/") == 2}
    if overall:
        say("")
        for name, value in overall.items():
            say(f"{name:28} {value:6.1f} %")
    if summary.model:
        model = summary.model
        say("")
        say(
            f"registered: {model['name']} version {model['version']}, alias {model['alias']}: {model['decision']}"
        )
    if "finetune" in summary.artifacts:
        say("")
        say(
            f'ask it:  llava ask --model {summary.artifacts["finetune"]} --image PHOTO "What is in the picture?"'
        )
        say(f"look at it:  mlflow ui --backend-store-uri {workspace.tracking.uri}")
