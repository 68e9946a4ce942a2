"""What every component agrees on: stores, leases, manifests, settings, tracking, and the runner."""

from components.contract.component import Component, Job, Settings, recipe, refusals, run_field, run_part
from components.contract.console import Console, say
from components.contract.digest import artifact_digest, canonical_json, fingerprint, sha256_of
from components.contract.lease import Guard, Lease, LeaseLost, acquire, holder
from components.contract.manifest import (
    MANIFEST,
    RUN,
    Artifact,
    Digest,
    FileEntry,
    Line,
    Manifest,
    artifact_folders,
    artifact_with,
    find_artifact,
    open_artifact,
    parquet_in,
    read_artifact,
    remove_artifact,
    verify,
)
from components.contract.printable import has_controls, printable
from components.contract.runner import Outcome, run_component
from components.contract.secrets import refuse_secrets, without_secret
from components.contract.store import Entry, Folder, Stat, Store, StoreError, open_store
from components.contract.tracking import TrackedRun, Tracking, TrackingError
from components.contract.workspace import Workspace

__all__ = [
    "MANIFEST",
    "RUN",
    "Artifact",
    "Component",
    "Console",
    "Digest",
    "Entry",
    "FileEntry",
    "Folder",
    "Guard",
    "Job",
    "Lease",
    "LeaseLost",
    "Line",
    "Manifest",
    "Outcome",
    "Settings",
    "Stat",
    "Store",
    "StoreError",
    "TrackedRun",
    "Tracking",
    "TrackingError",
    "Workspace",
    "acquire",
    "artifact_digest",
    "artifact_folders",
    "artifact_with",
    "canonical_json",
    "find_artifact",
    "fingerprint",
    "has_controls",
    "holder",
    "open_artifact",
    "open_store",
    "parquet_in",
    "printable",
    "read_artifact",
    "recipe",
    "refusals",
    "refuse_secrets",
    "remove_artifact",
    "run_component",
    "run_field",
    "run_part",
    "say",
    "sha256_of",
    "verify",
    "without_secret",
]
