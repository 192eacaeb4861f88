"""A run on two hosts with a network between them: two namespaces of the kernel, each with its own address and name."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_hosts import end, family, said, wait
from test_launch import go, graph, losses

DRIVER = """
import os, sys
from pathlib import Path
from flock import TABLE
from whimbrel.errors import UserError
from whimbrel.pipeline.console import Display
from whimbrel.pipeline.hosts import Hosts
from whimbrel.pipeline.recipe import read
from whimbrel.pipeline.run import StageError, Stopped, run
path, folder, rank = sys.argv[1:4]
try:
    recipe = read(path, sys.argv[4:], TABLE)
    words = (None, int(rank), "node0:29400") if rank else (None, None, None)
    run(recipe, Path(folder), Display(), Hosts.of(*words, os.environ, recipe.hosts))
except (Stopped, StageError, UserError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
HOSTS = """127.0.0.1 localhost
127.0.1.1 node{rank}
10.77.0.{other} node{away}
"""
"""As Debian writes it: a host's own name stands for an address that others cannot reach. Host 0 knows both, as a name
server would say."""
Start = Callable[..., list[subprocess.Popen[str]]]


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


class Net:
    """Two namespaces and a cable."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spaces = folder, [f"whimbrel-{os.getpid()}-{rank}" for rank in (0, 1)]
        self.cable = [f"wh{os.getpid()}{letter}"[-15:] for letter in "ab"]

    def build(self) -> None:
        """Lay it."""
        for space in self.spaces:
            ip("netns", "add", space)
        ends = zip(self.spaces, self.cable, strict=True)
        (space, device), (other, far) = ends
        ip("link", "add", device, "netns", space, "type", "veth", "peer", "name", far, "netns", other)
        for rank, (space, device) in enumerate(zip(self.spaces, self.cable, strict=True)):
            ip("-n", space, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", device)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", device, "up")
            text = HOSTS.format(rank=rank, away=1 - rank, other=2 - rank)
            (self.folder / f"hosts{rank}").write_text(text)

    def cut(self) -> None:
        """Take the cable out of host 0."""
        ip("-n", self.spaces[0], "link", "set", self.cable[0], "down")

    def command(self, rank: int) -> list[str]:
        """What makes a command one of a host."""
        script = f'mount --bind {self.folder}/hosts{rank} /etc/hosts && hostname node{rank} && exec "$@"'
        return ["ip", "netns", "exec", self.spaces[rank], "unshare", "--uts", "--mount", "sh", "-c", script, "sh"]

    def remove(self) -> None:
        """Take it away."""
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    made = Net(tmp_path)
    if not all(map(shutil.which, ("ip", "unshare", "mount", "hostname"))):
        pytest.skip("iproute2 or util-linux is not there")
    try:
        made.build()
        subprocess.run([*made.command(0), "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
    yield made
    made.remove()


@pytest.fixture
def start(tmp_path: Path, net: Net) -> Iterator[Start]:
    """Start a recipe that wants two hosts on both, as people do or as srun does."""
    path, running = tmp_path / "recipe.yaml", list[subprocess.Popen[str]]()
    path.write_text(graph({"data": 2}).text() + "launch: {nodes: 2}\n")

    def begin(*words: str, slurm: bool = False) -> list[subprocess.Popen[str]]:
        for rank in (0, 1):
            command = [sys.executable, "-c", DRIVER, str(path), str(tmp_path / "run"), "" if slurm else str(rank)]
            told = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node[0-1]"}
            environment = os.environ | (told | {"SLURM_NODEID": str(rank)} if slurm else {})
            running.append(
                subprocess.Popen([*net.command(rank), *command, *words], stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True, env=environment)
            )  # fmt: skip
        return running[-2:]

    yield begin
    for one in running:
        for pid in [*family(one.pid), one.pid]:
            end(pid)
        one.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("slurm", [False, True])
def test_two_hosts_on_a_network_do_what_one_process_does(tmp_path: Path, start: Start, slurm: bool) -> None:
    (first, spoken), (second, other) = said(start(slurm=slurm))
    assert first == second == 0, spoken + other
    go(tmp_path / "alone", {})
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert "launch:\n  nodes: 2" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.slow
def test_a_cable_that_is_cut_ends_both_hosts(tmp_path: Path, start: Start, net: Net) -> None:
    """40 s until the silence counts, 15 s for what runs to end by itself."""
    running = start("flock.train.steps=100000")
    wait(tmp_path, running, 7)
    began = time.monotonic()
    net.cut()
    (first, spoken), (second, other) = said(running)
    assert time.monotonic() - began < 90
    assert first == second == 1
    assert spoken.splitlines()[-1].startswith("StageError: stage flock: host 1 (node1) is gone; the same command"), (
        spoken
    )
    assert other.splitlines()[-1].startswith("StageError: host 0 (node0) is gone; the same command"), other


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_dies_ends_both_hosts(tmp_path: Path, start: Start, dead: int) -> None:
    """The one that computes, not the command: the others have heard from its host, and say which it was."""
    running = start("flock.train.steps=100000")
    wait(tmp_path, running, 7)
    began = time.monotonic()
    worker = [pid for pid in family(running[dead].pid) if b"whimbrel.pipeline.worker" in
              Path(f"/proc/{pid}/cmdline").read_bytes() and b"torch.distributed.run" not in
              Path(f"/proc/{pid}/cmdline").read_bytes()]  # fmt: skip
    assert len(worker) == 1
    os.kill(worker[0], signal.SIGKILL)
    for code, text in said(running):
        assert code == 1 and "one of its processes ended without a word" in text.splitlines()[-1], text
        assert f"host {dead} (node{dead})" in text.splitlines()[-1], text
    assert time.monotonic() - began < 60
