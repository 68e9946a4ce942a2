"""What an artifact holds, for a person."""

from components.contract import open_artifact, say


def show(uri: str) -> None:
    """Print the manifest of the artifact at `uri`, after looking whether its files are those it names."""
    artifact = open_artifact(uri)
    manifest = artifact.manifest
    say(f"{manifest.component} {manifest.digest}")
    say(
        f"made      {manifest.created:%Y-%m-%d %H:%M:%S} UTC by code {manifest.code}, "
        f"MLflow run {manifest.mlflow_run_id}"
    )
    for name, digest in {**manifest.inputs, **manifest.external}.items():
        say(f"from      {name:12} {digest[:16]}")
    say(f"files     {len(manifest.files):,}, {manifest.size / 2**20:,.1f} MiB, all there")
    for title, values in (("recipe", manifest.recipe), ("run", manifest.run), ("metrics", manifest.metrics)):
        for key, value in values.items():
            say(f"{title:9} {key} = {value}")
    for key, value in manifest.notes.items():
        text = str(value)
        say(f"note      {key}: {text if len(text) <= 400 else text[:400] + ' ...'}")
