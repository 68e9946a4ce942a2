"""`llava instruct --dry-run`: what a teacher would be asked about three photos, and what all of it would take."""

from components.contract import run_component, tell
from components.instruct.llm.estimate import dry_run as lines
from components.ray_cluster import connection
from components.shard import Shard
from llava.errors import RefusedInput
from workflows.config import WorkflowConfig
from workflows.train import open_workspace


def dry_run(config: WorkflowConfig, root: str, wait: bool) -> None:
    """Print it. The dataset is made first where it is not finished; the endpoint is not contacted."""
    if config.instruct.teacher != "llm":
        raise RefusedInput("--dry-run tells what a language model would be asked: set instruct.teacher=llm")
    with connection.disconnecting():
        dataset = run_component(Shard(), config.shard, {}, open_workspace(config.name, root, wait)).artifact
    for line in lines(config.instruct, dataset.folder, dataset.parquet("train")):
        tell(line)
