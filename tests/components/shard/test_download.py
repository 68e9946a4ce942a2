"""Downloads against a server that misbehaves: every row has its reason, limits hold, nothing private is touched."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from components.contract.store import StoreError, open_store
from components.shard import Shard, ShardSettings, download
from components.shard.download import Downloader, Fetched, is_public
from components.shard.source_settings import DownloadSettings
from components.shard.sources import SOURCES, outcomes
from components.shard.sources.base import RefusedSample
from tests.support.repository import REPOSITORY
from tests.support.strange_server import LARGE, StrangeServer

QUICK = DownloadSettings(timeout=1.0, tries=2, longest_pause=2.0, user_agent="a test, test@example.org")
MOST = 200_000


def picture(side: int = 40) -> bytes:
    Image.new("RGB", (side, side), (10, 120, 200)).save(buffer := io.BytesIO(), format="JPEG")
    return buffer.getvalue()


@pytest.fixture
def server() -> Iterator[StrangeServer]:
    with StrangeServer(picture()).running() as one:
        yield one


@pytest.fixture
def secret() -> Iterator[StrangeServer]:
    """A server that nobody may reach."""
    with StrangeServer(b"secret", "127.0.0.1").running() as one:
        yield one


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.2 counts as an address of the open internet; every other one is judged as always."""
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.2" or is_public(address))
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.05)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names and their addresses, in place of a name server."""
    known: dict[str, list[str]] = {"localhost": ["127.0.0.1"]}

    def look_up(host: Any, port: Any, *_: Any, **__: Any) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in known:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in known[name]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


def fetch(*urls: str, settings: DownloadSettings = QUICK, **options: Any) -> list[Fetched]:
    async def run() -> list[Fetched]:
        async with Downloader(settings, **{"max_bytes": MOST, **options}) as downloader:
            return await asyncio.gather(*(downloader.fetch(url) for url in urls))

    return asyncio.run(run())


def cc3m(folder: Path, lines: list[str], **options: Any) -> ShardSettings:
    folder.mkdir()
    (folder / "list.tsv").write_text("".join(f"{line}\n" for line in lines))
    defaults = {"download": QUICK, "max_image_bytes": MOST, "heldout": 0, "allow_private": False}
    return ShardSettings(source="cc3m", path=str(folder), **{**defaults, **options})


def run(settings: ShardSettings, kept: Path) -> list[Any]:
    listing = SOURCES["cc3m"].listing(settings)
    return list(outcomes(settings, listing.shared, listing.items, open_store(kept)))


def test_every_row_of_a_bad_list_is_accounted_for_and_nothing_private_is_reached(
    public: None, names: dict[str, list[str]], server: StrangeServer, secret: StrangeServer, tmp_path: Path
) -> None:
    server.elsewhere = secret.url
    names |= {"inside.example": ["127.0.0.1"], "photos.example": ["127.0.0.2"]}
    expected = {
        f"{server.url}/ok-1.jpg": "",
        f"{server.url}/ok-2.jpg?size=large": "",
        f"http://photos.example:{server.port}/ok-3.jpg": "",
        f"{server.url}/typed": "",
        f"{server.url}/moved": "",
        f"{server.url}/flaky": "",
        f"{server.url}/busy": "",
        f"{server.url}/404": "http-404",
        f"{server.url}/403": "http-403",
        f"{server.url}/500": "http-500",
        f"{server.url}/closed": "http-429",
        f"{server.url}/html": "html",
        f"{server.url}/junk": "unknown-format",
        f"{server.url}/cut": "cut-off",
        f"{server.url}/garbage": "no-http",
        f"{server.url}/announced": "too-many-bytes",
        f"{server.url}/endless": "too-many-bytes",
        f"{server.url}/slow": "timeout",
        f"{server.url}/hang": "timeout",
        f"{server.url}/round": "redirects",
        f"{server.url}/file": "url",
        f"{server.url}/loopback": "private-address",
        f"{server.url}/name": "private-address",
        f"{server.url}/private": "private-address",
        f"{server.url}/metadata": "private-address",
        f"{server.url}/six": "private-address",
        f"{secret.url}/secret": "private-address",
        f"http://inside.example:{secret.port}/secret": "private-address",
        f"http://[::1]:{secret.port}/secret": "private-address",
        "http://2130706433/secret": "url",
        "http://127.1/secret": "url",
        "http://nobody.example/a.jpg": "dns",
        f"http://127.0.0.2:{unused_port()}/a.jpg": "connect",
        "file:///etc/passwd": "url",
        "ftp://photos.example/a.jpg": "url",
        "//photos.example/a.jpg": "url",
        "http://": "url",
        "http://[oops": "url",
        "no url at all": "url",
    }
    lines = [f"a photo\t{url}" for url in expected] + [
        "a caption alone",
        f"\0\t{server.url}/ok-4.jpg",
        f"\t{server.url}/ok-1.jpg",
    ]
    started = time.monotonic()
    found = run(cc3m(tmp_path / "data", lines), tmp_path / "kept")
    reasons = [one.reason if isinstance(one, RefusedSample) else "" for one in found]
    assert dict(zip(expected, reasons, strict=False)) == expected
    assert reasons[len(expected) :] == ["no-row", "text-nul", "no-caption"]
    assert not secret.hits
    assert server.most_open <= 2 * QUICK.per_host  # it has two names
    assert server.sent["/endless"] < 20 * 2**20
    assert server.hits["/500"] == server.hits["/cut"] == QUICK.tries
    assert server.hits["/404"] == server.hits["/closed"] == server.hits["/html"] == 1
    assert server.agents == {"a test, test@example.org"}
    assert f"photos.example:{server.port}" in server.hosts
    assert time.monotonic() - started < 40
    good = [one for one in found if not isinstance(one, RefusedSample)]
    assert {one.row["image"]["bytes"] for one in good} == {server.picture}
    assert [one.row["id"] for one in good] == [f"{number:09d}" for number in range(7)]
    print(Counter(reason or "a row" for reason in reasons))


def test_a_name_that_turns_private_after_it_was_looked_up_is_not_followed(
    public: None, names: dict[str, list[str]], server: StrangeServer, secret: StrangeServer
) -> None:
    names["turns.example"] = ["127.0.0.2"]

    async def both() -> list[Fetched]:
        async with Downloader(QUICK, max_bytes=MOST) as downloader:
            first = await downloader.fetch(f"http://turns.example:{server.port}/ok")
            names["turns.example"] = ["127.0.0.1"]
            return [first, await downloader.fetch(f"http://turns.example:{secret.port}/secret")]

    first, second = asyncio.run(both())
    assert (first.data, second.reason) == (server.picture, "private-address")
    assert not secret.hits


@pytest.mark.parametrize(
    ("address", "open_"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("127.255.0.9", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("172.16.5.4", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%2", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", False),
        ("64:ff9b:1::808:808", False),
        ("2002:7f00:1::", False),
    ],
)
def test_only_addresses_of_the_open_internet_are_public(address: str, open_: bool) -> None:
    assert is_public(address) is open_


def test_retry_after_holds_back_the_whole_host_and_no_other(public: None, server: StrangeServer) -> None:
    one_by_one = QUICK.model_copy(update={"per_host": 1, "timeout": 5.0})
    with StrangeServer(picture(), "127.0.0.3").running() as other:
        started = time.monotonic()
        seconds = {}

        async def run() -> None:
            async with Downloader(one_by_one, max_bytes=MOST, allow_private=True) as downloader:

                async def one(url: str) -> None:
                    assert (await downloader.fetch(url)).data
                    seconds[url] = time.monotonic() - started

                urls = [f"{server.url}/busy", f"{server.url}/ok", f"{other.url}/ok"]
                await asyncio.gather(*map(one, urls))

        asyncio.run(run())
    assert seconds[f"{server.url}/busy"] >= 1
    assert seconds[f"{server.url}/ok"] >= 1
    assert seconds[f"{other.url}/ok"] < min(seconds[f"{server.url}/ok"], seconds[f"{server.url}/busy"])


def test_no_more_downloads_run_at_once_than_the_settings_say(server: StrangeServer) -> None:
    server.pause = 0.03
    urls = [f"{server.url}/ok-{number}" for number in range(30)]
    for settings, most in ((QUICK, QUICK.per_host), (QUICK.model_copy(update={"at_once": 2}), 2)):
        server.most_open = 0
        assert all(one.data for one in fetch(*urls, settings=settings, allow_private=True))
        assert server.most_open == most


def test_waiting_behind_slow_large_bodies_does_not_count_as_time(server: StrangeServer) -> None:
    settings = QUICK.model_copy(update={"tries": 1, "per_host": 20, "timeout": 2.0})
    server.held = True

    async def run() -> tuple[list[Fetched], list[Fetched]]:
        async with Downloader(settings, max_bytes=2 * LARGE, allow_private=True) as downloader:
            late = [asyncio.create_task(downloader.fetch(f"{server.url}/late-{n}")) for n in range(6)]
            while len(server.hits) < len(late):
                await asyncio.sleep(0.01)
            slow = [asyncio.create_task(downloader.fetch(f"{server.url}/drip-{n}")) for n in range(4)]
            while not downloader._large.locked():
                await asyncio.sleep(0.01)
            server.held = False
            return await asyncio.gather(*late), await asyncio.gather(*slow)

    late, slow = asyncio.run(run())
    assert [len(one.data or b"") for one in late] == [LARGE] * len(late)
    assert [one.reason for one in slow] == ["timeout"] * len(slow)


def test_the_environment_cannot_put_a_proxy_in_between(
    server: StrangeServer, secret: StrangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", secret.url)
    (found,) = fetch(f"{server.url}/ok", allow_private=True)
    assert found.data == server.picture
    assert not secret.hits


KILLED = """
    import sys
    from components.contract.store import open_store
    from components.shard import ShardSettings
    from components.shard.sources import SOURCES, cc3m, outcomes

    cc3m._KEEP_ROWS = 5
    settings = ShardSettings.model_validate_json(sys.argv[1])
    listing = SOURCES["cc3m"].listing(settings)
    list(outcomes(settings, listing.shared, listing.items, open_store(sys.argv[2])))
"""


def test_what_was_fetched_before_a_kill_is_not_fetched_again(server: StrangeServer, tmp_path: Path) -> None:
    server.pause = 0.05
    lines = [
        f"photo {number}\t{server.url}/{'404' if number % 4 == 3 else 'ok'}-{number}" for number in range(60)
    ]
    slow = QUICK.model_copy(update={"per_host": 2, "timeout": 10.0})
    settings = cc3m(tmp_path / "data", lines, allow_private=True, download=slow)
    kept = tmp_path / "kept"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), settings.model_dump_json(), str(kept)]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while len(list(kept.glob("*.arrow"))) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    before = dict(server.hits)
    stored = sum(pa.ipc.open_stream(path.read_bytes()).read_all().num_rows for path in kept.glob("*.arrow"))
    assert 15 <= stored <= len(before) < 60
    found = run(settings, kept)
    assert Counter(one.reason if isinstance(one, RefusedSample) else "" for one in found) == {
        "": 45,
        "http-404": 15,
    }
    assert len(server.hits) == 60
    twice = [path for path, count in server.hits.items() if count > 1]
    assert len(twice) == len(before) - stored
    after = dict(server.hits)
    again = run(settings, kept)
    assert dict(server.hits) == after
    assert [str(one) for one in again] == [str(one) for one in found]


DEAD = [f"a\thttp://host{number}.example/a.jpg" for number in range(4)]


def test_a_machine_without_a_network_does_not_turn_every_link_into_a_dead_one(
    public: None, names: dict[str, list[str]], server: StrangeServer, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=r"not one of 4 hosts answered .*is this machine online"):
        run(cc3m(tmp_path / "data", DEAD), tmp_path / "kept")
    assert not list((tmp_path / "kept").glob("*"))
    unfetchable = cc3m(tmp_path / "odd", ["a\tno url", "a\thttp://127.0.0.1/a.jpg", *DEAD])
    with pytest.raises(
        StoreError, match=r"not one of 4 hosts answered \(http://host0.*is this machine online"
    ):
        run(unfetchable, tmp_path / "odd-kept")
    run(cc3m(tmp_path / "before", [f"a\t{server.url}/ok"]), tmp_path / "kept")
    kept = list((tmp_path / "kept").glob("*"))
    gone = cc3m(tmp_path / "gone", [f"a\t{server.url}/ok", *DEAD])
    server.hangs = True
    with pytest.raises(StoreError, match=r"not one of 5 hosts answered .*is this machine online"):
        run(gone, tmp_path / "kept")
    assert list((tmp_path / "kept").glob("*")) == kept


def test_a_shard_that_is_left_with_dead_links_alone_is_finished(
    public: None, names: dict[str, list[str]], server: StrangeServer, tmp_path: Path
) -> None:
    good = [f"a\t{server.url}/ok-{number}" for number in range(3)]
    run(cc3m(tmp_path / "before", good), tmp_path / "kept")
    found = run(cc3m(tmp_path / "data", [*DEAD, *good]), tmp_path / "kept")
    assert [getattr(one, "reason", "") for one in found] == ["dns"] * 4 + [""] * 3


@pytest.mark.parametrize("answer", ["ok", "404"])
def test_a_small_shard_of_dead_links_is_finished_where_other_links_of_the_list_are_answered(
    public: None, names: dict[str, list[str]], server: StrangeServer, tmp_path: Path, answer: str
) -> None:
    alive = [f"a\t{server.url}/{answer}-{number}" for number in range(400)]
    settings = cc3m(tmp_path / "data", [*alive, *DEAD])
    listing = SOURCES["cc3m"].listing(settings)
    last = listing.items[400:]
    found = list(outcomes(settings, listing.shared, last, open_store(tmp_path / "kept")))
    assert [getattr(one, "reason", "") for one in found] == ["dns"] * 4
    assert sum(server.hits.values()) == 1


def test_a_list_of_links_becomes_a_dataset_through_ray(
    run_in: Any, server: StrangeServer, tmp_path: Path
) -> None:
    lines = [f"photo {number}\t{server.url}/{'404' if number == 3 else 'ok'}-{number}" for number in range(8)]
    settings = cc3m(tmp_path / "data", lines, allow_private=True, max_bad=0.2, rows_per_shard=5)
    outcome = run_in(Shard(), settings)
    manifest = outcome.artifact.manifest
    assert manifest.notes["refused"] == {"http-404": {"count": 1, "ids": ["000000003"]}}
    assert manifest.notes["rows"] == {"train": 7, "heldout": 0}
    assert not (outcome.artifact.local() / "checkpoints").exists()


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port: int = probe.getsockname()[1]
        return port
