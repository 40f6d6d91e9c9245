"""The coco world, downloaded from a server on localhost: what goes wrong on the way, and what stands at the end."""

import _thread
import errno
import hashlib
import json
import re
import shutil
import signal
import socket
import time
from dataclasses import replace
from types import SimpleNamespace

import pooch
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import ASKED, IDS, Server, jpeg, name, tiny_coco, write_catalogue

from alea_lib.core.files import DataError, DiskFullError
from alea_lib.datasets import coco
from alea_lib.datasets.__main__ import main
from alea_lib.datasets.coco import PARTS, check_coco, fetch_coco, load_catalogue, make_splits
from alea_lib.datasets.fetch import FetchError, Item, fetch
from alea_lib.datasets.world import World
from alea_lib.metrics.chair import chair
from alea_lib.metrics.pope import pope, read_pope
from alea_lib.metrics.timing import TimingSizes, synthesise
from alea_lib.metrics.truth import read_truth

ZIP = "/annotations/annotations_trainval2014.zip"
DISJOINT = ("activate", "validate", "chair500", "pope")
FILES = tiny_coco()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """pooch waits a second and more between two attempts."""
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))
    set_to(monkeypatch, WORKERS=3, TIMEOUT=5.0, TRIES=3)


def set_to(monkeypatch, **settings):
    for key, value in settings.items():
        monkeypatch.setattr(f"alea_lib.datasets.fetch.{key}", value)


@pytest.fixture
def server(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = Server(dict(FILES))
    yield server
    server.stop()


@pytest.fixture
def catalogue(server, tmp_path):
    return load_catalogue(write_catalogue(tmp_path / "catalogue", FILES), server.url)


def digests(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def one(server, sha256="", path="/val2014/one.bin"):
    """An item that the server has, of 200,000 bytes."""
    server.files[path] = BODY
    return Item("one.bin", server.url + path, sha256, 200_000)


def get(item, folder):
    folder.mkdir(exist_ok=True)
    fetch([item], folder, "test")


# ---- the world


def test_the_world_opens_and_its_files_are_read(catalogue, tmp_path):
    world = fetch_coco(tmp_path / "w", catalogue=catalogue)
    assert world.info["sizes"] == {"chair500": 6, "validate": 4, "activate": 8, "pope": 6, "test": 12}
    for split in map(World(tmp_path / "w").split, world.info["sizes"]):
        truth = read_truth(split.instances, split.captions)
        assert list(truth.instances) == split.ids == sorted(split.ids)
        assert [f.name for f in split.files] == [name(i) for i in split.ids]
        assert all(f.read_bytes() == jpeg(i) for f, i in zip(split.files, split.ids, strict=True))
        for i in split.ids:
            assert truth.instances[i] == ({"cup", "dog"} if i in IDS[::2] else {"cup"})
            assert truth.captions[i] == {"cup", "bowl"}
        assert len(json.loads(split.captions.read_text())["annotations"]) == 5 * len(split.ids)
        rows = json.loads(split.instances.read_text())["annotations"]
        assert rows[0].keys() == {"id", "image_id", "category_id", "bbox", "area", "iscrowd"}
    told = [{"image_id": i, "caption": "A cup and a train."} for i in world.split("chair500").ids]
    split = world.split("chair500")
    items = chair(coco_table(told), read_truth(split.instances, split.captions)).items
    assert items.loc[items["metric"] == "chair_i", ["num", "den"]].sum().tolist() == [6, 12]
    asked = read_pope(world.pope("random"))
    assert sorted(set(asked["image_id"])) == world.split("pope").ids == ASKED
    said = coco_table([{"question_id": q, "answer": "Yes."} for q in asked["question_id"]])
    assert pope(said, asked).items.query("metric == 'pope_accuracy'")[["num", "den"]].sum().tolist() == [6, 12]


def coco_table(rows):
    import pandas as pd

    return pd.DataFrame(rows)


def test_ids_are_published_with_their_sum(catalogue, tmp_path):
    world = fetch_coco(tmp_path / "w", catalogue=catalogue)
    published = json.loads((tmp_path / "w" / "splits.json").read_text())
    assert published["seed"] == 0 and published["rule"] == "by sum"
    for split in DISJOINT:
        row = published["splits"][split]
        assert row["ids"] == world.split(split).ids and row["n"] == len(row["ids"])
        lines = "".join(f"{i}\n" for i in row["ids"])
        assert row["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert sum(published["splits"][s]["n"] for s in DISJOINT) == len({i for s in DISJOINT for i in world.split(s).ids})


def test_a_second_call_downloads_and_changes_nothing(server, catalogue, tmp_path):
    fetch_coco(tmp_path / "w", catalogue=catalogue)
    before = digests(tmp_path / "w")
    server.seen.clear()
    fetch_coco(tmp_path / "w", catalogue=catalogue)
    assert server.seen == [] and digests(tmp_path / "w") == before


def test_parallel_equals_serial(server, catalogue, tmp_path, monkeypatch):
    for folder, workers in (("a", 1), ("b", 8)):
        set_to(monkeypatch, WORKERS=workers)
        fetch_coco(tmp_path / folder, catalogue=catalogue)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(server.asked("/val2014/")) == 2 * 24  # each image once


def test_parts_are_added_and_stay(server, catalogue, tmp_path):
    first = fetch_coco(tmp_path / "w", ["pope"], catalogue=catalogue)
    assert first.info["sizes"] == {"pope": 6} and len(server.asked("/val2014/")) == 6
    with pytest.raises(ValueError, match=r"no split 'test'; there are \['pope'\]"):
        first.split("test")
    second = fetch_coco(tmp_path / "w", ["chair500"], catalogue=catalogue)
    assert second.info["sizes"] == {"chair500": 6, "pope": 6, "test": 12} and len(server.asked("/val2014/")) == 12
    second.split("chair500").files[0].unlink()
    assert len(check_coco(tmp_path / "w", catalogue)[1]) == 1
    third = fetch_coco(tmp_path / "w", ["annotations"], catalogue=catalogue)
    assert third.info["sizes"] == {"pope": 6}  # no split without all of its images
    assert not (tmp_path / "w" / "annotations" / "instances_test.json").exists()
    assert check_coco(tmp_path / "w", catalogue)[1] == []


def test_editions_of_pope(catalogue, tmp_path):
    lengths = {}
    for edition in ("new", "old", "new"):
        world = fetch_coco(tmp_path / "w", ["pope"], edition, catalogue)
        assert world.info["pope_edition"] == edition
        lengths[edition] = [len(read_pope(world.pope(s))) for s in ("random", "popular", "adversarial")]
    assert lengths == {"new": [12, 12, 12], "old": [11, 12, 12]}


def test_images_that_are_there_already_are_taken(server, catalogue, tmp_path):
    own = tmp_path / "w" / "images" / "val2014"
    own.mkdir(parents=True)
    for i in IDS:
        (own / name(i)).write_bytes(jpeg(i))
    (own / name(ASKED[0])).write_bytes(jpeg(ASKED[0])[:-40])  # this one is cut
    fetch_coco(tmp_path / "w", catalogue=catalogue)
    assert server.asked("/val2014/") == [f"/val2014/{name(ASKED[0])}"]
    assert check_coco(tmp_path / "w", catalogue)[1] == []


# ---- ids


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(1, 600_000), min_size=30, max_size=80), st.integers(0, 9), st.randoms())
def test_splits_depend_on_ids_and_seed_alone(ids, seed, random):
    pope_ids = random.sample(sorted(ids), 5)
    sizes = {"chair500": 7, "validate": 4, "activate": 6}

    def made(order, **other):
        content = {"images": [{"id": i} for i in order], "annotations": [1]}
        return make_splits(content, pope_ids, seed, {**sizes, **other})

    splits = made(sorted(ids))
    assert [len(splits[s]) for s in ("chair500", "validate", "activate", "pope")] == [7, 4, 6, 5]
    assert len(set().union(*splits.values())) == 22 and set().union(*splits.values()) <= ids
    assert splits["pope"] == sorted(pope_ids)
    shuffled = random.sample(sorted(ids), len(ids))
    assert made(shuffled) == splits  # not the file's order
    larger = made(shuffled, activate=13)
    assert set(splits["activate"]) < set(larger["activate"])
    assert all(larger[s] == splits[s] for s in ("chair500", "validate", "pope"))


def test_splits_by_hand():
    """The rule as it is published, once more in other words."""
    content = {"images": [{"id": i} for i in (1, 2, 3, 4, 5)]}
    order = sorted((1, 2, 4, 5), key=lambda i: hashlib.sha256(f"7:{i}".encode()).hexdigest())
    splits = make_splits(content, [3], 7, {"a": 2, "b": 1})
    assert splits == {"a": sorted(order[:2]), "b": order[2:3], "pope": [3]}
    assert len({str(make_splits(content, [3], seed, {"a": 2})) for seed in range(20)}) > 3
    with pytest.raises(DataError, match=r"POPE asks about 1 images that the annotations lack, e.g. \[9\]"):
        make_splits(content, [9], 7, {"a": 2})
    with pytest.raises(DataError, match="want 5 images, and 4 are there"):
        make_splits(content, [3], 7, {"a": 5})


def test_the_published_catalogue():
    """The real one: whole sums, sizes of the splits, addresses; and its mirror has the same names."""
    real, mirrored = load_catalogue(), load_catalogue(mirror="http://127.0.0.1:9/m/")
    assert real.sizes == {"chair500": 500, "validate": 500, "activate": 2000} and list(real.sizes)[-1] == "activate"
    assert real.archive().size == 252_872_794
    items = [real.archive(), *(i for e in ("new", "old") for i in real.questions(e).values())]
    assert len(items) == 7 and all(re.fullmatch("[0-9a-f]{64}", i.sha256) for i in items)
    assert len({i.sha256 for i in items}) == 7 and all("e3e3926" in i.url for i in real.questions("old").values())
    assert real.image(42) == Item(
        "images/val2014/COCO_val2014_000000000042.jpg",
        "http://images.cocodataset.org/val2014/COCO_val2014_000000000042.jpg",
        "",
        6_645_013_297 // 40_504,
    )
    served = {p.replace(name(IDS[0]), name(42)) for p in FILES}
    for item in (mirrored.archive(), mirrored.image(42), *mirrored.questions("old").values()):
        assert item.url.removeprefix("http://127.0.0.1:9/m") in served


# ---- a download that does not go well


BODY = bytes(range(250)) * 800
SUM = hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize("published", [True, False])
def test_a_cut_download_starts_over(server, tmp_path, published):
    item = one(server, sha256=SUM if published else "")
    server.faults["/val2014/one.bin"] = [lambda h: h.whole(keep=70_000), lambda h: h.whole(keep=90_000)]
    get(item, tmp_path / "w")
    assert len(server.seen) == 3 and (tmp_path / "w" / "one.bin").read_bytes() == BODY
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["one.bin"]


def test_a_cut_call_is_reported_and_leaves_nothing(server, tmp_path, monkeypatch):
    item = one(server)
    server.faults["/val2014/one.bin"] = [lambda h: h.whole(keep=70_000)]
    with monkeypatch.context() as patch:
        set_to(patch, TRIES=1)
        with pytest.raises(FetchError, match=r"one.bin: .*IncompleteRead\(70000 bytes read, 130000 more .*\(1 att"):
            get(item, tmp_path / "w")
    assert list((tmp_path / "w").iterdir()) == []
    get(item, tmp_path / "w")
    assert (tmp_path / "w" / "one.bin").read_bytes() == BODY


def test_a_wrong_sum_is_refused(server, tmp_path):
    item = one(server, sha256="0" * 64)
    with pytest.raises(FetchError, match=f"one.bin: SHA256 .* expected 0000.* but got {SUM}.*Nothing was kept"):
        get(item, tmp_path / "w")
    assert list((tmp_path / "w").iterdir()) == [] and len(server.seen) == 3


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_is_not_there_fails_at_once(server, tmp_path, status):
    item = one(server)
    server.faults["/val2014/one.bin"] = [lambda h: h.send_error(status)]
    with pytest.raises(FetchError, match=rf"one.bin: {status} .*is the address \(--from\) right"):
        get(item, tmp_path / "w")
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(server, tmp_path, status):
    item = one(server)
    server.faults["/val2014/one.bin"] = [lambda h: h.send_error(status)] * 2
    get(item, tmp_path / "w")
    assert len(server.seen) == 3
    server.faults["/val2014/one.bin"] = [lambda h: h.send_error(status)] * 9
    with pytest.raises(FetchError, match=rf"one.bin: {status} .*\(3 attempts\)"):
        get(item, tmp_path / "again")


def test_redirects_are_followed(server, tmp_path):
    def elsewhere(handler):
        handler.send_response(302)
        handler.send_header("Location", "/other/place")
        handler.end_headers()

    item = one(server)
    server.files["/other/place"] = b"found"
    server.faults["/val2014/one.bin"] = [elsewhere]
    get(item, tmp_path / "w")
    assert (tmp_path / "w" / "one.bin").read_bytes() == b"found"


def test_a_silent_server_is_left(server, tmp_path, monkeypatch):
    set_to(monkeypatch, TIMEOUT=0.2, TRIES=2)
    item = one(server)
    server.faults["/val2014/one.bin"] = [lambda h: server.closing.wait(10)] * 2
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"timed out.*\(2 attempts\); is there a network"):
        get(item, tmp_path / "w")
    assert time.monotonic() - start < 5


def test_a_server_that_falls_silent_is_asked_again(server, tmp_path, monkeypatch):
    set_to(monkeypatch, TIMEOUT=0.3)

    def stall(handler):
        handler.whole(keep=150_000)
        server.closing.wait(10)

    item = one(server, sha256=SUM)
    server.faults["/val2014/one.bin"] = [stall]
    get(item, tmp_path / "w")
    assert len(server.seen) == 2
    assert (tmp_path / "w" / "one.bin").read_bytes() == BODY


def test_no_network(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        item = Item("one.bin", f"http://127.0.0.1:{free.getsockname()[1]}/one.bin", "", 1)
    with pytest.raises(FetchError, match=r"one.bin: .*efused.* \(3 attempts\); is there a network"):
        get(item, tmp_path / "w")


# ---- a disk that is full, a user who has enough


def test_a_full_disk_is_noticed_before_anything_starts(server, catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=3 << 30))
    big = replace(catalogue, sizes={**catalogue.sizes, "activate": 2_000_000})
    wanted = r"w needs 4\.\d\d GiB more and 3\.00 GiB are free; make room, choose fewer parts \(--only\)"
    with pytest.raises(DiskFullError, match=wanted):
        fetch_coco(tmp_path / "w", catalogue=big)
    assert server.seen == [] and not (tmp_path / "w").exists()
    fetch_coco(tmp_path / "w", ["pope"], catalogue=catalogue)


def test_what_is_there_needs_no_room(catalogue, tmp_path, monkeypatch):
    fetch_coco(tmp_path / "w", catalogue=catalogue)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=0))
    fetch_coco(tmp_path / "w", catalogue=catalogue)


def test_a_disk_that_fills_up_meanwhile(server, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    item = one(server)
    with monkeypatch.context() as patch, pytest.raises(DiskFullError, match="no room to write .*one.bin; free"):
        patch.setattr(pooch.HTTPDownloader, "__call__", full)
        get(item, tmp_path / "w")
    assert not (tmp_path / "w" / "one.bin").exists()
    get(item, tmp_path / "w")


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background, whose shells ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_call_leaves_nothing_that_looks_finished(server, catalogue, tmp_path, interruptible):
    def enough(handler):
        _thread.interrupt_main()
        handler.whole(keep=500)
        server.closing.wait(0.2)

    chosen = make_splits({"images": [{"id": i} for i in IDS]}, ASKED, 0, catalogue.sizes)["activate"][4]
    server.faults[f"/val2014/{name(chosen)}"] = [enough] * 3
    with pytest.raises(KeyboardInterrupt):
        fetch_coco(tmp_path / "w", catalogue=catalogue)
    there = sorted((tmp_path / "w" / "images" / "val2014").glob("*.jpg"))
    assert 0 < len(there) < 24 and not (tmp_path / "w" / "world.json").exists()
    assert all(p.read_bytes() == FILES[f"/val2014/{p.name}"] for p in there)
    with pytest.raises(FileNotFoundError, match="fetch coco"):
        World(tmp_path / "w")
    server.faults.clear()
    server.seen.clear()
    fetch_coco(tmp_path / "w", catalogue=catalogue)
    again = server.asked("/val2014/")  # perhaps not all: a part may have been whole
    assert (
        again and len(set(again)) == len(again) and not {p.rpartition("/")[2] for p in again} & {p.name for p in there}
    )
    assert check_coco(tmp_path / "w", catalogue)[1] == []


def test_a_failure_stops_the_others(server, tmp_path, monkeypatch):
    set_to(monkeypatch, WORKERS=2)
    for k in range(60):
        server.files[f"/{k}"] = b"x" * 2000
    items = [Item(f"{k}.bin", f"{server.url}/{k}", "", 2000) for k in range(60)]
    server.faults["/5"] = [lambda h: h.send_error(404)]
    (tmp_path / "w").mkdir()
    with pytest.raises(FetchError, match="/5: 404 Client Error"):
        fetch(items, tmp_path / "w", "test")
    assert len(server.seen) < 40


# ---- what is in the files


def test_an_image_must_be_whole(server, catalogue, tmp_path):
    path = f"/val2014/{name(ASKED[0])}"
    for body in (jpeg(1)[:-60], b"<html>busy</html>"):  # cut before it was served; a page with status 200
        server.files[path] = body
        with pytest.raises(FetchError, match="not a whole JPEG file"):
            fetch_coco(tmp_path / "w", ["pope"], catalogue=catalogue)
        assert not (tmp_path / "w" / "world.json").exists()
        assert not (tmp_path / "w" / "images" / "val2014" / name(ASKED[0])).exists()


def test_a_check_finds_what_changed(server, catalogue, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "w"
    world = fetch_coco(folder, catalogue=catalogue)
    assert check_coco(folder, catalogue) == (6 + 24, [])
    first, second = world.split("pope").files[:2]
    first.write_bytes(jpeg(5)[:-60])
    second.unlink()
    questions = folder / "source" / "pope-old" / "coco_pope_random.json"
    questions.write_text("{}")
    (folder / "annotations" / "instances_test.json").write_text("{}")
    faults = check_coco(folder, catalogue)[1]
    assert [f.partition(":")[0] for f in faults] == [
        "source/pope-old/coco_pope_random.json", f"images/val2014/{first.name}", f"images/val2014/{second.name}",
        "split test",
    ]  # fmt: skip
    assert main(command(server, tmp_path, monkeypatch, "--check")) == 2
    out, err = capsys.readouterr()
    assert f"{second.name}: missing" in out and err.count("\n") == 1 and "is not in order" in err


def test_annotations_that_hold_nothing_are_reported(catalogue, tmp_path):
    folder = tmp_path / "w"
    fetch_coco(folder, ["annotations"], catalogue=catalogue)
    (folder / "source" / "instances_val2014.json").write_text("{}")
    with pytest.raises(DataError, match="instances_val2014.json: not a whole annotations file"):
        fetch_coco(folder, catalogue=catalogue)


# ---- the command


def command(server, tmp_path, monkeypatch, *more):
    write_catalogue(tmp_path / "root" / "data", FILES)
    monkeypatch.setenv("ALEA_ROOT", str(tmp_path / "root"))
    return ["fetch", "coco", "--to", str(tmp_path / "w"), "--from", server.url, *more]


def test_the_command_fetches_and_checks(server, tmp_path, monkeypatch, capsys):
    assert main(command(server, tmp_path, monkeypatch, "--only", "pope,chair500", "--edition", "old")) == 0
    assert "POPE edition old; images: chair500 6, pope 6, test 12" in capsys.readouterr().out
    assert main(command(server, tmp_path, monkeypatch, "--check")) == 0
    assert "files checked, 0 faults" in capsys.readouterr().out


def test_the_mirror_may_stand_in_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ALEA_COCO_MIRROR", server.url + "/")
    line = command(server, tmp_path, monkeypatch, "--only", "annotations")
    del line[line.index("--from") : line.index("--from") + 2]
    assert main(line) == 0 and server.asked(ZIP) == [ZIP]


def test_a_list_downloads_nothing(server, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        assert main(command(server, tmp_path, patch, "--list")) == 0
    assert server.seen == [] and not (tmp_path / "w").exists()
    assert main(["fetch", "coco", "--list"]) == 0
    out = capsys.readouterr().out
    assert "252,872,794 | 031296bb" in out and all(f"\n{part} | " in out for part in PARTS)
    assert "chair500 | 82,029,000 | - | 500 images" in out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--only", "pope,train"], "there is no 'train' to fetch; choose from annotations, pope"),
        (["--from", "ftp://there"], "must start with http"),
        (["--from", "http://127.0.0.1:1"], "is there a network"),
        (["--check"], "is not in order"),
    ],
)
def test_errors_of_the_command_are_one_line(server, tmp_path, monkeypatch, capsys, more, message):
    assert main(command(server, tmp_path, monkeypatch, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("lacks", ["instances", "sha256"])
def test_a_damaged_catalogue_is_reported(tmp_path, lacks):
    path = write_catalogue(tmp_path, FILES)
    path.write_text(path.read_text().replace(f"{lacks}:", "other:"))
    with pytest.raises(DataError, match=f"not a catalogue of the coco world.*{lacks}"):
        load_catalogue(path)


# ---- size


@pytest.mark.slow
def test_annotations_of_cocos_size_take_less_than_a_minute(tmp_path):
    """40,000 images, 290,000 instances, 200,000 captions: CPU seconds from source to a world, and of reading it."""
    sizes = TimingSizes()
    made = synthesise(tmp_path, sizes)
    (tmp_path / "source").mkdir()
    for path, kind in zip(made, ("instances", "captions"), strict=True):
        content = {"images": [], **json.loads(path.read_text())}
        (tmp_path / "source" / f"{kind}_val2014.json").write_text(json.dumps(content))
    real = load_catalogue()
    start = time.process_time()
    content = json.loads((tmp_path / "source" / "instances_val2014.json").read_text())
    splits = make_splits(content, range(1000, 1500), real.seed, real.sizes)
    coco._write_annotations(real, splits, tmp_path)
    folder = tmp_path / "annotations"
    truth = read_truth(folder / "instances_activate.json", folder / "captions_activate.json")
    assert len(truth) == 2000 and time.process_time() - start < 60
