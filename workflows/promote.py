"""The champion's alias, moved by hand: promotion of any version, and the way back.

Each move leaves `moved.TIME` at the version that became champion: who, when, from which version, why. The champion
before a version stands in its tag `champion_before`, whoever made it champion: `register` or a person.
"""

import getpass
import json
from datetime import UTC, datetime

from components.contract import open_store, say
from components.registry import BEFORE, CHALLENGER, CHAMPION, Registry, Version, existing_registry
from llava.errors import RefusedInput

MOVED = "moved."


def promote(name: str, version: str, root: str, by: str | None = None, reason: str = "") -> None:
    """Make `version` of `name` the champion; RefusedInput where it is unknown or its files are gone."""
    registry = existing_registry(root)
    champion = registry.by_alias(name, CHAMPION)
    wanted = _version(registry, name, version)
    if champion is not None and champion.version == wanted.version:
        say(f"models:/{name}/{version} is the champion already")
        return
    registry.tag(wanted, {BEFORE: champion.version if champion else ""})
    _move(registry, wanted, champion, "promote", by, reason)


def rollback(name: str, root: str, by: str | None = None, reason: str = "") -> None:
    """Make the champion before the champion of `name` champion again; RefusedInput where there was none."""
    registry = existing_registry(root)
    champion = registry.by_alias(name, CHAMPION)
    if champion is None:
        raise RefusedInput(
            f"{name} has no champion at {registry.uri}: `llava promote {name} VERSION` makes one"
        )
    before = champion.tags.get(BEFORE)
    if not before:
        raise RefusedInput(
            f"models:/{name}/{champion.version} names no champion before it: there is no way back; "
            f"`llava promote {name} VERSION` makes any version champion"
        )
    _move(registry, _version(registry, name, before), champion, "rollback", by, reason)
    # The way that led to it is gone back: should it be champion again, that is another story.
    registry.tag(champion, {BEFORE: ""})


def _move(
    registry: Registry, wanted: Version, champion: Version | None, how: str, by: str | None, reason: str
) -> None:
    when = datetime.now(UTC)
    audit = {
        "how": how,
        "who": by or getpass.getuser(),
        "when": when.isoformat(),
        "from": champion.version if champion else None,
        "to": wanted.version,
        "reason": reason,
    }
    registry.tag(wanted, {f"{MOVED}{when:%Y%m%dT%H%M%S.%fZ}": json.dumps(audit)})
    registry.name_as(wanted, CHAMPION)
    challenger = registry.by_alias(wanted.name, CHALLENGER)
    if challenger is not None and challenger.version == wanted.version:
        registry.drop_alias(wanted.name, CHALLENGER)
    before = f"before: version {champion.version}" if champion else "there was none"
    say(
        f"models:/{wanted.name}/{wanted.version} is champion now ({before}), by {audit['who']}: {reason or how}"
    )


def _version(registry: Registry, name: str, version: str) -> Version:
    """A version whose files are there."""
    found = registry.by_version(name, version) if version.isdigit() else None
    if found is None:
        raise RefusedInput(f"{name} has no version {version!r} at {registry.uri}")
    if open_store(found.source).stat("config.json") is None:
        raise RefusedInput(f"models:/{name}/{version}: nothing lies at {found.source} any more")
    return found
