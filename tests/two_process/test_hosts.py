"""A run on two hosts, which are two commands on one machine: one set of records, one cause, going on together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flock import TABLE
from small import launch
from test_launch import go, graph, losses

from whimbrel.errors import UserError
from whimbrel.model.language import LanguageModel
from whimbrel.parallel.mesh import patience
from whimbrel.pipeline.child import Job, Seat, _environment
from whimbrel.pipeline.console import Display
from whimbrel.pipeline.hosts import Hosts, Line, digest, leading
from whimbrel.pipeline.recipe import read

DRIVER = """
import os, sys
from pathlib import Path
from flock import TABLE
from whimbrel.errors import UserError
from whimbrel.pipeline.console import Display
from whimbrel.pipeline.hosts import Hosts
from whimbrel.pipeline.recipe import read
from whimbrel.pipeline.run import StageError, Stopped, run
path, folder, rank, endpoint = sys.argv[1:5]
try:
    run(read(path, sys.argv[5:], TABLE), Path(folder), Display(), Hosts.of(2, int(rank), endpoint, {}))
except (Stopped, StageError, UserError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
HERE = socket.gethostname()
Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the same command on both hosts: `words` are overrides, `second` those of host 1 where they differ."""
    path, running = tmp_path / "recipe.yaml", list[subprocess.Popen[str]]()
    path.write_text(graph({"data": 2}).text())

    def begin(*words: str, second: tuple[str, ...] | None = None, folder: str = "run") -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{free.getsockname()[1]}"
        both = []
        for rank, said in enumerate((words, words if second is None else second)):
            where = tmp_path / (folder if rank else "run")
            command = [sys.executable, "-c", DRIVER, str(path), str(where), str(rank), place, *said]
            both.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        running.extend(both)
        return both

    yield begin
    for one in running:
        for pid in [*family(one.pid), one.pid]:
            end(pid)
        one.communicate()


def family(parent: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    own = [pid for pid, above in pairs if above == parent]
    return [one for pid in own for one in (pid, *family(pid))]


def end(pid: int) -> None:
    """Kill a process, if it is there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def said(running: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """How both ended, and what they said."""
    spoken = [one.communicate(timeout=240)[0] for one in running]
    return [(one.returncode, text) for one, text in zip(running, spoken, strict=True)]


def wait(folder: Path, running: list[subprocess.Popen[str]], step: int) -> None:
    """Until a step is in the records."""
    metrics, deadline = folder / "run" / "flock.partial" / "metrics.jsonl", time.monotonic() + 180
    while not (metrics.exists() and metrics.read_text().count("\n") >= step):
        assert time.monotonic() < deadline and all(one.poll() is None for one in running)
        time.sleep(0.005)


@pytest.mark.slow
def test_two_hosts_do_what_one_process_does(tmp_path: Path, start: Start) -> None:
    (first, spoken), (second, other) = said(start())
    assert first == second == 0, spoken + other
    go(tmp_path / "alone", {})
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert "flock: the part of this host is done" in other and "of 6 steps" not in other
    LanguageModel.load(tmp_path / "run" / "flock")
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert logs == ["flock.host1.log", "flock.log"] and not (tmp_path / "run" / ".hosts").exists()
    made = json.loads((tmp_path / "run" / "flock" / "manifest.json").read_text())
    assert made["metrics"]["step"] == 6 and (tmp_path / "run" / "report.html").exists()
    (first, spoken), (second, other) = said(start())  # and again: nothing is left to do
    assert first == second == 0 and "done before" in spoken, spoken + other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dead", "say"),
    [
        (1, f"stage flock: host 1 ({HERE}) is gone; the same command on"),
        (0, "host 0 (127.0.0.1) is gone; the same command on"),
    ],
)
def test_the_death_of_a_host_is_told_on_the_other_and_both_go_on(
    tmp_path: Path, start: Start, dead: int, say: str
) -> None:
    """Everything on one host is killed in the middle; the same commands go on from the last save."""
    running = start("flock.train.steps=60")
    wait(tmp_path, running, 7)
    began = time.monotonic()
    for pid in [running[dead].pid, *family(running[dead].pid)]:
        end(pid)
    code, text = said(running)[1 - dead]
    assert code == 1 and text.splitlines()[-1].startswith(f"StageError: {say}"), text
    assert time.monotonic() - began < 90
    (first, spoken), (second, other) = said(start("flock.train.steps=60"))
    assert first == second == 0 and "going on from" in spoken, spoken + other
    assert len(losses(tmp_path / "run")) == 60


@pytest.mark.slow
def test_a_mistake_on_one_host_is_the_line_on_both(start: Start) -> None:
    for code, text in said(start("flock.trouble=user")):
        assert code == 1
        assert text.splitlines()[-1] == "UserError: stage flock: row 9 is torn; set heldout to rows that are whole", (
            text
        )


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_on_one_host_stops_both_at_a_safe_point(tmp_path: Path, start: Start, asked: int) -> None:
    running = start("flock.train.steps=200")
    wait(tmp_path, running, 3)
    running[asked].send_signal(signal.SIGINT)
    for code, text in said(running):
        assert code == 1 and text.splitlines()[-1].startswith("Stopped: "), text
    partial = tmp_path / "run" / "flock.partial"
    steps = (partial / "metrics.jsonl").read_text().count("\n")
    assert steps < 200 and (partial / "checkpoints" / f"step-{steps:08d}").is_dir()


@pytest.mark.slow
def test_hosts_with_different_work_or_folders_are_refused(start: Start) -> None:
    for code, text in said(start(second=("flock.train.steps=7",))):
        assert code == 1 and "other settings or another version; start the same command on every host" in text
    for code, text in said(start(folder="elsewhere")):
        assert code == 1 and "is not the folder that host 0 works in; set --out to one that all hosts see" in text


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ((None, None, None, {}), Hosts()),
        ((1, None, None, {}), Hosts()),
        ((2, 1, "node1", {}), Hosts(2, 1, "node1", 29400)),
        ((3, 0, "10.0.0.1:77", {"SLURM_STEP_NUM_NODES": "9"}), Hosts(3, 0, "10.0.0.1", 77)),
        ((None, None, None, {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[003-4],b"}),
         Hosts(2, 1, "gpu003", 29400)),
        ((None, 1, "a", {}, 4), Hosts(4, 1, "a", 29400)),
        ((1, None, None, {}, 4), Hosts()),
        ((None, None, None, {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "a[1-2]"}, 2),
         Hosts(2, 1, "a1", 29400)),
        ((None, None, None, {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "a-1,b",
                             "MASTER_PORT": "5"}), Hosts(2, 0, "a-1", 5)),
    ],
)  # fmt: skip
def test_hosts_are_read_from_torchruns_words_or_from_slurm(words: Any, place: Hosts) -> None:
    assert Hosts.of(*words) == place


@pytest.mark.parametrize(
    ("words", "say"),
    [
        ((None, 1, None, {}), "--nodes is None; set --nodes to the number of hosts"),
        ((2, None, "a:1", {}), "--node-rank is None; set --node-rank from 0 to 1"),
        ((2, 2, "a:1", {}), "--node-rank is 2; set --node-rank from 0 to 1"),
        ((2, 1, None, {}), "--rdzv-endpoint is None; set it to the name of host 0 and a port, for example node1:29400"),
        ((None, None, None, {}, 2), "launch.nodes is 2, but this host was started alone; start it on 2 hosts, each"),
        ((None, None, None, {"SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "a[1-3]"}, 2),
         "launch.nodes is 2, but srun started 3; .* or set launch.nodes to 3"),
        ((2, 1, "a:b", {}), "--rdzv-endpoint is a:b; set it"),
        ((2, 0, "a:65536", {}), "--rdzv-endpoint is a:65536; set it"),
        ((2, 0, "a:0", {}), "--rdzv-endpoint is a:0; set it"),
        ((None, None, None, {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8"}), "--ntasks-per-node to 1"),
        ((None, None, None, {"SLURM_STEP_NUM_NODES": "two"}), "'two'.*; set --nodes, --node-rank and --rdzv-endpoint"),
        ((None, None, None, {"SLURM_STEP_NUM_NODES": "2"}), "SLURM_STEP_NODELIST.*; set --nodes, --node-rank and"),
        ((None, None, None, {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NODEID": "0",
                             "MASTER_PORT": "99999"}), "--rdzv-endpoint is n1:99999; set it"),
    ],
)  # fmt: skip
def test_words_that_do_not_fit_are_refused(words: Any, say: str) -> None:
    with pytest.raises(UserError, match=say):
        Hosts.of(*words)


def test_processes_that_hosts_cannot_share_are_refused() -> None:
    with pytest.raises(UserError, match=r"makes 4 processes, which 3 hosts do not share evenly; set .* of 6, or"):
        Hosts(3, 0, "a").check(graph({"data": 4}))
    Hosts(2, 1, "a").check(graph({"data": 4}))
    Hosts(2, 1, "a").check(graph({}))


def test_a_recipe_says_how_many_hosts_it_wants(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(graph({"data": 2}).text() + "launch: {nodes: 2}\n")
    assert read(path, (), TABLE).hosts == 2 and read(path, ["launch.nodes=1"], TABLE).hosts == 1
    path.write_text(read(path, (), TABLE).text())
    assert read(path, (), TABLE).hosts == 2 and graph({}).hosts == 0
    for wrong in ("launch.nodes=two", "launch.nodes=-1", "launch.nodes=true"):
        with pytest.raises(UserError, match=r"launch.nodes is .*; set launch.nodes to the number of hosts"):
            read(path, [wrong], TABLE)
    with pytest.raises(UserError, match=r"launch has an unknown key 'node'; did you mean 'nodes'"):
        read(path, ["launch.node=2"], TABLE)


def test_processes_of_several_hosts_talk_where_the_hosts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    node = graph({"data": 2}).nodes[0]
    job = Job(node, {}, Path(), Path(), None, Seat(2, 0, "a", 1, "127.0.0.1"))
    assert _environment(job)["GLOO_SOCKET_IFNAME"] == "lo"
    for seat in (Seat(), Seat(2, 0, "a", 1, "192.0.2.77")):  # nobody's address
        assert "GLOO_SOCKET_IFNAME" not in _environment(replace(job, seat=seat))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    assert _environment(job)["GLOO_SOCKET_IFNAME"] == "mine"


@pytest.mark.parametrize("said", ["soon", "0", "-1", "nan", "1e9"])
def test_a_patience_that_is_no_number_of_hours_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert patience() == timedelta(hours=24)
    monkeypatch.setenv("WHIMBREL_PATIENCE", "1.5")
    assert patience() == timedelta(minutes=90)
    monkeypatch.setenv("WHIMBREL_PATIENCE", said)
    with pytest.raises(UserError, match=r"WHIMBREL_PATIENCE is .*; set it to a number of hours, for example 24"):
        patience()


def test_ranks_wait_as_long_as_one_works_alone() -> None:
    """Encoding a large set of conversations, for example, which takes longer than torch's half an hour."""
    launch("wait.py", 2, timeout=60)


def test_a_host_that_went_away_before_all_had_come_may_come_again(tmp_path: Path) -> None:
    """And what no host says is a stranger's: it neither ends the run nor counts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hosts = Hosts(3, 0, "127.0.0.1", free.getsockname()[1])
    recipe = graph({"data": 2})
    met = list[int]()

    def lead() -> None:
        with leading(hosts, recipe, tmp_path, Display()) as leader:
            met.extend(sorted(leader.others))

    def call(word: Any) -> Line:
        while True:
            with suppress(ConnectionRefusedError):
                line = Line(socket.create_connection(("127.0.0.1", hosts.port)))
                line.socket.sendall(json.dumps(word).encode() + b"\n")
                return line

    def come(host: int) -> Line:
        line = call({"host": host, "recipe": digest(recipe)})
        assert "token" in (line.hear(30.0) or {})
        line.say({"ended": None})
        return line

    thread = threading.Thread(target=lead, daemon=True)
    thread.start()
    for stranger in (5, {"host": "one"}, {"host": 1}):
        call(stranger).close()
    come(1).close()
    both = [come(1), come(2)]
    thread.join(30.0)
    assert met == [1, 2] and [line.hear(5.0) for line in both] == [{"over": None}] * 2
    for line in both:
        line.close()
