"""What a person reads at the end of a run, and what to type next."""

import sys
from pathlib import Path

from components.contract import Workspace, open_store, read_artifact, say
from workflows.stages import last_giving, training_stages
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
            # Caption scores go from 0 to 1, as in the tool that defines them.
            in_percent = name.rpartition("/")[2] not in ("bleu4", "rouge_l", "cider")
            say(f"{name:28} {value:6.1f} %" if in_percent else f"{name:28} {value:8.3f}")
    if summary.model:
        model = summary.model
        say("")
        say(
            f"registered: {model['name']} version {model['version']}, alias {model['alias']}: {model['decision']}"
        )
    if trained := last_giving("model", summary.artifacts.keys() & {one.name for one in training_stages()}):
        say("")
        picture, question = _example(summary)
        say(
            f'ask it:  {_command("llava")} ask --model {summary.artifacts[trained]} --image {picture} "{question}"'
        )
        tracking = workspace.tracking.uri
        shown = (
            tracking
            if tracking.startswith("http")
            else f"{_command('mlflow')} ui --backend-store-uri {tracking}"
        )
        say(f"look at it:  {shown}")


def _command(name: str) -> str:
    """How to call what is installed beside this command, from where it was called."""
    return str(Path(sys.argv[0]).with_name(name)) if Path(sys.argv[0]).stem == "llava" else name


def _example(summary: Summary) -> tuple[str, str]:
    """A held-out picture that lies here, and a question about it."""
    evaluated = last_giving("evaluation", summary.artifacts)
    evaluation = open_store(summary.artifacts[evaluated]) if evaluated else None
    found = (
        read_artifact(evaluation) if evaluation is not None and evaluation.local_path is not None else None
    )
    if found is None:
        return "PHOTO", "What is in the picture?"
    example = found.manifest.notes["example"]
    return f"{found.folder.local_path}/{example['picture']}", example["question"]
