"""The users of an MLflow server that asks for a name: an administrator, and the one as whom runs log in.

`python -m workflows.kubernetes.mlflow_users`, before the server starts and with its own environment: the administrator
and the address of the users' database as MLflow reads them, the runs' user from MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD. A password that changed is changed here, too. The runs' user is never an administrator:
whoever gets hold of a run's credentials can neither make users nor change what others made.
"""

from __future__ import annotations

import configparser
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from llava.errors import LlavaError, RefusedInput
from workflows import failures

CONFIG = "MLFLOW_AUTH_CONFIG_PATH"
ADMIN = "MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_ADMIN_PASSWORD"
RUNS = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"


class User(NamedTuple):
    """Who may log in."""

    name: str
    password: str
    is_admin: bool


def users() -> tuple[User, User]:
    """The administrator and the runs' user of this environment. Raises `RefusedInput`."""
    missing = [name for name in (*ADMIN, *RUNS) if not os.environ.get(name)]
    if missing:
        raise RefusedInput(f"{', '.join(missing)}: not set; see the Secrets in docs/cluster.md")
    (admin, admins), (runs, theirs) = ((os.environ[name], os.environ[key]) for name, key in (ADMIN, RUNS))
    if admin == runs:
        raise RefusedInput(
            f"{ADMIN[0]} and {RUNS[0]} are both {admin!r}: runs must not log in as the administrator"
        )
    return User(admin, admins, True), User(runs, theirs, False)


def database() -> str:
    """The address of the users' database, from the file that MLflow's server reads."""
    path = Path(os.environ.get(CONFIG, ""))
    config = configparser.ConfigParser(interpolation=None)
    if not config.read(path) or not config.has_option("mlflow", "database_uri"):
        raise RefusedInput(f"{CONFIG}={path}: no file with a database_uri under [mlflow]")
    return config.get("mlflow", "database_uri")


def make(uri: str, wanted: tuple[User, ...]) -> None:
    """Make the users, or give those that exist the password and the rights of `wanted`."""
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store: Any = SqlAlchemyStore()
    store.init_db(uri)
    for user in wanted:
        if store.has_user(user.name):
            store.update_user(user.name, user.password, user.is_admin)
        else:
            store.create_user(user.name, user.password, user.is_admin)


def main() -> None:
    """Entry point of the pod's first container."""
    try:
        make(database(), users())
    except Exception as error:
        known = error if isinstance(error, LlavaError) else LlavaError(f"MLflow's users: {error}")
        sys.exit(failures.tell(known))


if __name__ == "__main__":
    main()
