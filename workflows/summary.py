"""What a person reads at the end of a run, and what to type next."""

import json
import shlex
import sys
from pathlib import Path

from components.contract import Artifact, Workspace, open_store, read_artifact, say
from components.scoring.benchmarks import find
from components.scoring.outcomes import exams_of
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
        units = _units(summary)
        for name, value in overall.items():
            unit, digits = units.get(name.split("/")[1], ("%", 1))
            # Two more columns where more digits follow: the points stand under each other.
            say(f"{name:28} {value:{5 + digits}.{digits}f} {unit}".rstrip())
    if summary.model:
        model = summary.model
        say("")
        say(
            f"registered: {model['name']} version {model['version']}, alias {model['alias']}: {model['decision']}"
        )
    if trained := last_giving("model", summary.artifacts.keys() & {one.name for one in training_stages()}):
        say("")
        picture, question = _example(summary)
        # Questions and names come out of data: what a person may paste into a shell is quoted for it.
        asked = ["ask", "--model", summary.artifacts[trained], "--image", picture, question]
        say(f"ask it:  {shlex.join([_command('llava'), *asked])}")
        tracking = workspace.tracking.uri
        shown = (
            tracking
            if tracking.startswith("http")
            else shlex.join([_command("mlflow"), "ui", "--backend-store-uri", tracking])
        )
        say(f"look at it:  {shown}")
        if linear := _linear_in_vllm(summary.artifacts[trained]):
            say(f"vLLM knows a projector of one linear layer by another name; serve it with  {linear}")


def _linear_in_vllm(uri: str) -> str | None:
    """The option with which vLLM loads the model, where it needs one."""
    found = read_artifact(open_store(uri))
    if found is None or json.loads(found.read("model/config.json"))["projector_hidden_act"] != "linear":
        return None
    other = {"projector_hidden_act": "torch.nn.modules.linear.Identity"}
    return shlex.join(["--hf-overrides", json.dumps(other)])


def _command(name: str) -> str:
    """How to call what is installed beside this command, from where it was called."""
    return str(Path(sys.argv[0]).with_name(name)) if Path(sys.argv[0]).stem == "llava" else name


def _evaluation(summary: Summary) -> Artifact | None:
    evaluated = last_giving("evaluation", summary.artifacts)
    return read_artifact(open_store(summary.artifacts[evaluated])) if evaluated else None


def _units(summary: Summary) -> dict[str, tuple[str, int]]:
    """Of each exam's scores: unit, and digits behind the point."""
    evaluation = _evaluation(summary)
    notes = exams_of(evaluation) if evaluation else {}
    known = {title: find(note.benchmark) for title, note in notes.items()}
    return {title: (benchmark.unit, benchmark.digits) for title, benchmark in known.items()}


def _example(summary: Summary) -> tuple[str, str]:
    """A held-out picture that lies here, and a question about it."""
    found = _evaluation(summary)
    if found is None or found.folder.local_path is None:
        return "PHOTO", "What is in the picture?"
    example = found.note("example", dict[str, str])
    return f"{found.folder.local_path}/{example.get('picture', '')}", example.get("question", "")
