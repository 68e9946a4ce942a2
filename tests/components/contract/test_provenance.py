"""Which code runs: the digest follows every source file, and nothing else."""

import shutil
from pathlib import Path

from components.contract.provenance import installed_root, source_digest, source_root


def test_the_digest_follows_the_sources_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("llava", "components", "workflows"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source_root() / name, tmp_path / name, ignore=ignored)
    assert source_digest(tmp_path) == source_digest()
    (tmp_path / "llava" / "notes.txt").write_text("no code")
    assert source_digest(tmp_path) == source_digest()
    for changed in ("components/pretrain.py", "workflows/presets/tiny.yaml"):
        before = source_digest(tmp_path)
        with (tmp_path / changed).open("a") as file:
            file.write("# changed\n")
        assert source_digest(tmp_path) != before


def test_the_installed_package_is_found_where_it_lies() -> None:
    found = installed_root()
    assert found is not None
    assert (found / "workflows" / "cli.py").is_file()
