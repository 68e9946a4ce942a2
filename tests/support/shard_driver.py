"""A run of `shard` in a process of its own, for tests that kill it: address, root, MLflow's URI, files, settings."""

import logging
import os
import sys

import ray

from components.contract.console import Console
from components.contract.runner import Workspace, run_component
from components.contract.store import open_store
from components.contract.tracking import Tracking
from components.shard import Shard, ShardSettings
from llava.errors import LlavaError

PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "LLAVA_OUTAGE_SECONDS")


def main() -> None:
    """Run; status 1 and the error's line where it fails."""
    address, root, mlflow, files, settings = sys.argv[1:]
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": env} if env else None,
    )
    workspace = Workspace(open_store(root), Tracking(mlflow, "killed", files), console=Console())
    try:
        run_component(Shard(), ShardSettings.model_validate_json(settings), {}, workspace)
    except LlavaError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
