"""Shards that are elsewhere: fetched over faults, kept within a limit, trained from to the bit."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shlex
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset

from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.data import remote
from dr2dist.data.cache import Cache, Wanted
from dr2dist.data.fields import Fields
from dr2dist.data.index import read_index
from dr2dist.data.indexing import index_shards
from dr2dist.data.remote import RemoteReader
from dr2dist.data.stream import ShardDataset
from dr2dist.errors import UserError
from tests.commands import ROOT, call, dr2dist
from tests.images import make_folder, make_small_shards, samples_of
from tests.pool import Pool
from tests.runs import losses, masters
from tests.servers import S3_BUCKET, Server, s3, serve


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_shards(tmp_path_factory.mktemp("remote"), 90) / "train"


@pytest.fixture
def fresh_ranks() -> Iterator[Pool]:
    """Which have run nothing before, as those of a run by the command: what fetches shards starts
    threads and processes, once each."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    found = serve(shards)
    yield found
    found.stop()


def wanted(server: Server, number: int = 0) -> Wanted:
    index = read_index(server.url)
    return index.wanted(index.shards[number])


def test_a_shard_is_fetched_once_and_read_as_the_local_one(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    cache, local = Cache(tmp_path / "cache", 10**9), read_index(shards)
    for _ in range(2):
        file, members = cache.open(wanted(server))
        assert file.read() == local.path(local.shards[0]).read_bytes()
        assert [members[k] for k in range(len(members))] == samples_of(local)[: len(members)]
    assert server.faults.sent[local.shards[0].name] == local.shards[0].bytes
    assert read_index(server.url).digest() == local.digest()


@pytest.mark.parametrize("fault", ["busy", "cut", "lie"])
def test_what_breaks_off_is_asked_for_again(
    fault: str, server: Server, shards: Path, tmp_path: Path
) -> None:
    want = wanted(server)
    setattr(server.faults, fault, 3)
    file, _ = Cache(tmp_path / "cache", 10**9).open(want)
    assert file.read() == (shards / "shard-000000.tar").read_bytes()
    assert not getattr(server.faults, fault)


def test_a_server_without_ranges_is_read_whole(
    server: Server, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dr2dist.data.remote.BLOCK", 10_000)
    server.faults.ranges = False
    with RemoteReader(f"{server.url}/shard-000000.tar") as file:
        assert file.read() == (shards / "shard-000000.tar").read_bytes()


def test_a_large_file_comes_in_ranges_and_goes_on_where_it_was(
    server: Server, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dr2dist.data.remote.BLOCK", 10_000)
    size = (shards / "shard-000000.tar").stat().st_size
    server.faults.cut = 2
    with RemoteReader(f"{server.url}/shard-000000.tar") as file:
        assert file.read() == (shards / "shard-000000.tar").read_bytes()
    assert size <= server.faults.sent["shard-000000.tar"] <= size + 2 * 10_000


def test_what_is_gone_is_one_line(server: Server, tmp_path: Path) -> None:
    cache, want = Cache(tmp_path / "cache", 10**9, patience=1.0), wanted(server)
    with pytest.raises(UserError, match=r"gone\.tar: cannot be read: .*404"):
        cache.open(replace(want, url=f"{server.url}/gone.tar"))
    server.stop()
    with pytest.raises(UserError, match=r"cannot be read: .*, for 1 s") as caught:
        cache.open(want)
    assert "\n" not in str(caught.value) and cache.used() == 0
    for url, message in (("ftpx://a/b", "ftpx:// cannot be read"), ("s3:/a", "no index.json")):
        with pytest.raises(UserError, match=message):
            read_index(url)


def test_a_wrong_checksum_is_fetched_again_once_and_then_named(
    server: Server, tmp_path: Path
) -> None:
    want = wanted(server)
    with pytest.raises(UserError, match=r"shard-000000\.tar: its checksum differs .* again"):
        Cache(tmp_path / "cache", 10**9).open(replace(want, sha256="0" * 64))
    assert server.faults.sent["shard-000000.tar"] == 2 * (want.bytes or 0)
    assert not list((tmp_path / "cache").glob("*.tar*"))
    with pytest.raises(UserError, match=r"has \d+ bytes, the index says 7"):
        Cache(tmp_path / "cache", 10**9).open(replace(want, bytes=7))


def test_the_limit_holds_and_what_is_used_last_goes(server: Server, tmp_path: Path) -> None:
    index = read_index(server.url)
    wants = [index.wanted(shard) for shard in index.shards]
    room = sum(want.bytes or 0 for want in wants[:2])
    cache = Cache(tmp_path / "cache", int(room * 1.2))
    cache.fetch(wants[0], 900)
    cache.fetch(wants[1], 100)
    file, _ = cache.open(wants[0])
    cache.fetch(wants[2], 0)
    assert [cache.holds(want) for want in wants[:3]] == [False, True, True]
    assert cache.used() <= cache.limit
    assert len(file.read()) == wants[0].bytes  # who has it open reads on
    cache.plan({wants[2].name: 5000, wants[1].name: 3}, 50)
    cache.fetch(wants[0])
    assert [cache.holds(want) for want in wants[:3]] == [True, True, False]
    with pytest.raises(UserError, match=r"data\.cache\.limit: 1000 bytes leave 1000 for"):
        Cache(tmp_path / "small", 1000).open(wants[0])


def test_a_cache_leaves_others_files_alone_and_forgets_dead_runs(
    server: Server, tmp_path: Path
) -> None:
    folder, want = tmp_path / "cache", wanted(server)
    folder.mkdir()
    (folder / "precious.tar").write_bytes(b"x" * 100)
    dead = folder / f"{replace(want, url='http://gone/a.tar').name}.part"
    dead.write_bytes(b"x" * 10**6)
    Cache(folder, (want.bytes or 0) * 2).fetch(want)
    assert not dead.exists() and (folder / "precious.tar").exists()
    shutil.rmtree(folder)  # in the middle of a run
    file, _ = Cache(folder, 10**9).open(want)
    assert len(file.read()) == want.bytes


def test_folders_that_cannot_be_written_are_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"data\.cache\.folder: .*/file/cache"):
        Cache(tmp_path / "file" / "cache", 10**9).open(wanted(server))


def _fetch_all(folder: Path, limit: int, wants: list[Wanted], order: list[int]) -> None:
    for number in order:
        file, members = Cache(folder, limit).open(wants[number])
        assert len(file.read()) == wants[number].bytes and len(members)


def test_many_processes_share_a_cache(server: Server, tmp_path: Path) -> None:
    index = read_index(server.url)
    wants = [index.wanted(shard) for shard in index.shards]
    everything = sum(want.bytes or 0 for want in wants)
    context = multiprocessing.get_context("fork")
    for limit, folder in (
        (10 * everything, tmp_path / "a"),
        (int(everything * 0.7), tmp_path / "b"),
    ):
        server.faults.sent.clear()
        orders = [list(range(k, len(wants))) + list(range(k)) for k in range(4)]
        processes = [
            context.Process(target=_fetch_all, args=(folder, limit, wants, order))
            for order in orders
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
        assert Cache(folder, limit).used() <= limit
        if limit > everything:  # each once
            assert sum(server.faults.sent[shard.name] for shard in index.shards) == everything


def test_a_shard_that_is_replaced_is_fetched_anew(shards: Path, tmp_path: Path) -> None:
    """By what the index says of it; what another index takes of it has arrays of its own."""
    folder = tmp_path / "served"
    shutil.copytree(shards, folder)
    server = serve(folder)
    cache = Cache(tmp_path / "cache", 10**9)
    old = wanted(server)
    assert cache.open(old)[0].read() == (folder / "shard-000000.tar").read_bytes()
    shutil.copy(folder / "shard-000001.tar", folder / "shard-000000.tar")
    data = (folder / "shard-000000.tar").read_bytes()
    new = replace(old, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert cache.open(new)[0].read() == data
    assert len(cache.open(replace(new, needs=("npy",)))[1]) == 0
    server.stop()


def test_what_a_cache_has_is_made_good(server: Server, tmp_path: Path) -> None:
    """Arrays without a shard go, damaged ones are made anew, a live fetch's are left alone."""
    cache, want = Cache(tmp_path / "cache", 10**9), wanted(server)
    cache.fetch(want)
    (members,) = (tmp_path / "cache").glob("*.members")
    members.write_bytes(members.read_bytes()[:20])
    orphan = tmp_path / "cache" / "dr2dist-0-gone.tar.members"
    orphan.write_bytes(b"x")
    alive = tmp_path / "cache" / "dr2dist-0-live.tar.members.tmp"
    alive.write_bytes(b"x")
    (tmp_path / "cache" / "dr2dist-0-live.tar").write_bytes(b"x")
    assert len(cache.open(want)[1]) == 16
    cache.fetch(wanted(server, 1))
    assert not orphan.exists() and alive.exists()


def test_a_larger_file_than_the_index_says_is_not_fetched(server: Server, tmp_path: Path) -> None:
    want = wanted(server)
    with pytest.raises(UserError, match=r"has \d+ bytes, the index says 1024"):
        Cache(tmp_path / "cache", 10**9).open(replace(want, bytes=1024))
    assert not server.faults.sent["shard-000000.tar"]


def test_a_bucket_that_does_not_answer_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its libraries try again too, without end for a person: asked once a try, it is ours to say
    for how long."""
    monkeypatch.setattr(remote, "READ", 0.2)
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*deaf.getsockname()))
        with pytest.raises(UserError, match=r"deaf\.tar: cannot be read: .*, for 0 s"):
            RemoteReader("s3://a-bucket/deaf.tar", patience=0.0)
        deaf.setblocking(False)
        deaf.accept()[0].close()
        with pytest.raises(BlockingIOError):
            deaf.accept()


def dataset(source: str, cache: Cache | None, unreadable: Any = "other") -> ShardDataset:
    fields = Fields({"label": "cls"})
    return ShardDataset(source, fields, lambda values: values, 0, unreadable, cache)


def test_skipping_hides_no_cache_that_does_not_do(server: Server, tmp_path: Path) -> None:
    for cache, message in (
        (Cache(tmp_path / "a", 1000), r"data\.cache\.limit"),
        (None, "is not on this machine"),
    ):
        with pytest.raises(UserError, match=message):
            dataset(server.url, cache)[0, 0]
    broken = dataset(server.url, Cache(tmp_path / "b", 10**9, patience=0.0))
    server.stop()
    with pytest.raises(UserError, match="cannot be read"):  # no server is no lost shard
        broken[0, 0]


CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 1}}
task: {num_classes: 2}
data: {train: SHARDS, val: SHARDS, num_workers: 1, MORE}
optim: {lr: 1.0e-3}
train: {steps: 14, micro_batch: 5, validate_every: 7}
checkpoint: {steps: 5}
output: OUTPUT
"""


def test_a_runs_curve_is_the_same_from_anywhere(
    shards: Path, tmp_path: Path, fresh_ranks: Pool
) -> None:
    """From a folder, by http and from S3; and broken off in the middle and gone on with. The
    validation counts all samples there too."""
    server = serve(shards)
    with s3(shards) as environment:
        places = {"folder": str(shards), "http": server.url, "s3": f"s3://{S3_BUCKET}"}
        for name in (*places, "broken"):
            kept = f"cache: {{folder: {tmp_path}/cache-{name}, limit: 1GB}}"
            source = places.get(name, server.url)
            text = CONFIG.replace("SHARDS", source).replace("OUTPUT", str(tmp_path / name))
            path = tmp_path / f"{name}.yaml"
            path.write_text(text.replace("MORE", "unreadable: fail" if name == "folder" else kept))
            options: Any = {"path": str(path), "environment": environment}
            if name == "broken":
                fresh_ranks.run("tests.remote_cases:run_until", step=8, **options)
            summaries = fresh_ranks.run("tests.remote_cases:run_config", **options)
            assert all(each["last"]["samples"] == 63 for each in summaries)
    server.stop()
    wanted = masters(tmp_path / "folder")
    for name in ("folder", "http", "s3", "broken"):
        assert Checkpoint(checkpoints(tmp_path / name)[-1]).state["step"] == 14
    for name in ("http", "s3", "broken"):
        assert losses(tmp_path / name) == losses(tmp_path / "folder"), name
        for key, value in masters(tmp_path / name).items():
            assert torch.equal(value, wanted[key]), (name, key)


def test_shards_of_a_bucket_are_indexed_where_they_are(shards: Path, tmp_path: Path) -> None:
    server = serve(shards)
    names = f"{server.url}/shard-{{000000..000003}}.tar"
    found = index_shards([names], tmp_path / "index.json", progress=False, workers=2)
    server.stop()
    assert found.index is not None and all(map(found.index.is_remote, found.index.shards))
    assert samples_of(found.index) == samples_of(read_index(shards))
    assert found.index.digest() == read_index(shards).digest()


def test_a_cache_that_is_too_small_is_refused_before_anything_starts(
    server: Server, tmp_path: Path, capfd: Any
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {name: vit_tiny_patch16_224, weights: random, image_size: 32}\n"
        "task: {name: classification, num_classes: 2}\n"
        f"data: {{train: '{server.url}', cache: {{folder: {tmp_path}/cache, limit: 5000}}}}\n"
        "optim: {name: sgd, lr: 0.01}\n"
        f"train: {{steps: 2, micro_batch: 4}}\noutput: {tmp_path}/run\n"
    )
    for more in ((), ("--dry-run",)):
        status, _, err = call(capfd, "train", str(path), *more)
        assert status == 2 and "data.cache.limit is 5000 bytes" in err.splitlines()[-1], err
    assert not (tmp_path / "run").exists()


def test_the_readmes_way_from_a_bucket_to_a_run_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lines as they stand, but for the bucket's address, the cache's folder and the model."""
    photos, bucket = make_folder(tmp_path / "photos", 60), tmp_path / "bucket"
    for name, numbers in (("train", range(4)), ("val", range(2))):
        for number in numbers:
            kept = [p for k, p in enumerate(sorted(photos.rglob("*.*"))) if k % 6 == number]
            write_shard(bucket / f"{name}-{number:06d}.tar", kept)
    block = (ROOT / "README.md").read_text().split("From a bucket of shards")[1].split("```")[1]
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").strip().splitlines()]
    assert [line[:2] for line in lines] == [
        ["pip", "install"],
        ["dr2dist", "shards"],
        ["dr2dist", "shards"],
        ["dr2dist", "train"],
    ]
    lines[3] += ["model.name=vit_tiny_patch16_224", "model.weights=random", "model.image_size=32"]
    lines[3] += ["model.options={depth: 2}"]
    lines[3] += ["train.micro_batch=4", "task.num_classes=2", "train.epochs=1"]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    with s3(bucket) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for line in lines[1:]:
            changed = [
                word.replace("s3://bucket", f"s3://{S3_BUCKET}").replace("/scratch", str(tmp_path))
                for word in line[1:]
            ]
            result = dr2dist(*changed, folder=tmp_path)
            assert result.returncode == 0, result.stderr + result.stdout
    summary = json.loads((tmp_path / "runs" / "photos" / "summary.json").read_text())
    assert summary["last"]["samples"] == 20 and summary["steps"] == 5
    assert len(list((tmp_path / "shards").glob("dr2dist-*.tar"))) == 6


def write_shard(path: Path, photos: list[Path]) -> None:
    path.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for photo in photos:
            label = str(int(photo.parent.name == "dark")).encode()
            key = photo.name.replace(".", "-")
            writer.write({"__key__": key, photo.suffix[1:]: photo.read_bytes(), "cls": label})
