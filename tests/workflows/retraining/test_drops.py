"""What has come in: finished drops that a root has not taken, on a folder and on S3."""

import threading
from pathlib import Path

import pytest

from components.contract import open_store
from llava.errors import RefusedInput
from workflows import config as configs
from workflows.retraining.drops import READY, look, pending, take
from workflows.retraining.retrain import retrain


def arrive(prefix: str, name: str, ready: bool = True) -> None:
    store = open_store(f"{prefix}/{name}")
    store.write("data.json", f'["{name}"]'.encode())
    store.write("images/a.png", b"not looked at")
    if ready:
        store.write(READY, b"")


def test_a_prefix_under_which_nothing_lies_holds_nothing_new_and_is_named(root: str) -> None:
    incoming = f"{root}-in"
    if not incoming.startswith("s3://"):
        Path(incoming).mkdir()
    looked = look(root, [incoming])
    assert (looked.new, looked.waiting, looked.empty) == ([], [], [incoming])
    arrive(incoming, "monday", ready=False)
    assert look(root, [incoming]).empty == []


def test_a_prefix_that_is_no_folder_is_refused(folder_root: str) -> None:
    open_store(f"{folder_root}-in").write("a-file", b"")
    for mistyped in (f"{folder_root}-inn", f"{folder_root}-in/a-file"):
        with pytest.raises(RefusedInput, match=f"--drop {mistyped}: there is no folder"):
            look(folder_root, [f"{folder_root}-in", mistyped])


def test_a_retraining_refuses_a_mistyped_folder_and_names_a_bare_prefix(
    folder_root: str, s3_root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = configs.load("tiny", [])
    with pytest.raises(RefusedInput, match="there is no folder"):
        retrain(tiny, folder_root, [f"{folder_root}-inn"])
    assert not Path(folder_root).exists()
    assert retrain(tiny, folder_root, [f"{s3_root}/inn"]).result == "nothing new"
    assert f"nothing at all lies under {s3_root}/inn" in capsys.readouterr().err


def test_a_drop_is_new_until_it_is_taken(root: str) -> None:
    incoming = f"{root}-in"
    arrive(incoming, "monday")
    arrive(incoming, "tuesday")
    monday, tuesday = sorted(pending(root, [incoming], settle=0), key=lambda drop: drop.uri)
    assert (monday.uri, monday.files) == (open_store(incoming).uri + "/monday", 3)
    assert take(root, monday, {"result": "challenger"})
    assert not take(root, monday, {"result": "again"})
    assert pending(root, [incoming], settle=0) == [tuesday]


def test_a_drop_that_changed_after_it_was_taken_is_new_again(root: str) -> None:
    incoming = f"{root}-in"
    arrive(incoming, "monday")
    (monday,) = pending(root, [incoming], settle=0)
    take(root, monday, {})
    open_store(f"{incoming}/monday").write("more.json", b"[1]")
    (changed,) = pending(root, [incoming], settle=0)
    assert (changed.uri, changed.digest == monday.digest) == (monday.uri, False)


def test_the_same_files_under_another_name_are_not_new(s3_root: str) -> None:
    arrive(f"{s3_root}-in", "monday")
    (monday,) = pending(s3_root, [f"{s3_root}-in"], settle=0)
    take(s3_root, monday, {})
    for file in ("data.json", "images/a.png", READY):
        data = open_store(f"{s3_root}-in/monday").read(file)
        open_store(f"{s3_root}-in/copy").write(file, data)
    assert pending(s3_root, [f"{s3_root}-in"], settle=0) == []


def test_a_drop_without_its_marker_waits(root: str) -> None:
    incoming = f"{root}-in"
    arrive(incoming, "monday", ready=False)
    looked = look(root, [incoming], settle=0)
    assert (looked.new, looked.waiting) == ([], [open_store(incoming).uri + "/monday"])


def test_a_drop_whose_files_still_change_waits(folder_root: str) -> None:
    incoming = f"{folder_root}-in"
    arrive(incoming, "monday")
    late = threading.Timer(0.2, lambda: open_store(f"{incoming}/monday").write("late.json", b"[]"))
    late.start()
    looked = look(folder_root, [incoming], settle=1.0)
    late.join()
    assert (looked.new, len(looked.waiting)) == ([], 1)


def test_files_right_under_the_prefix_are_no_drop(folder_root: str) -> None:
    open_store(f"{folder_root}-in").write(READY, b"")
    looked = look(folder_root, [f"{folder_root}-in"])
    assert (looked.new, looked.empty) == ([], [])


@pytest.mark.parametrize("prefixes", [2, 3])
def test_several_prefixes_are_looked_at_together(folder_root: str, prefixes: int) -> None:
    places = [f"{folder_root}-in{number}" for number in range(prefixes)]
    for place in places:
        arrive(place, "monday")
    assert len(pending(folder_root, places, settle=0)) == prefixes
