"""Several machines through torchrun: two agents on this machine, a worker killed, the run continued by itself."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

SETTINGS = ["--epochs", "3", "--set", "rollout.samples_per_epoch=8", "--set", "update.batch_size=4", "--set", "rollout.steps=3",
            "--set", "run.preview_images=0", "--set", "reward.watch=[]"]  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_agents_continue_after_a_worker_was_killed(tmp_path):
    run, port = tmp_path / "run", free_port()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", "-m", "tdpo_cli", "train", "--preset", "quickstart", "--out", str(run),
        "--resume", *SETTINGS,
    ]  # fmt: skip
    # torchrun counts restarts by machine, and its shared store waits for workers of one count: docs/clusters.md
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = []
    try:
        for number in range(2):
            with open(tmp_path / f"{number}.txt", "wb") as said:
                agents.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))
        until(lambda: metrics(run), agents, tmp_path)
        worker = children(agents[1].pid)[0]
        os.kill(worker, signal.SIGKILL)
        until(lambda: all(agent.poll() is not None for agent in agents), [], tmp_path)
        said = (tmp_path / "0.txt").read_text() + (tmp_path / "1.txt").read_text()
        assert [agent.returncode for agent in agents] == [0, 0], said
    finally:
        for agent in agents:
            agent.kill()
    assert [row["epoch"] for row in metrics(run)] == [0, 1, 2]
    entries = json.loads((run / "env.json").read_text())
    assert len(entries) == 2 and entries[1]["world_size"] == 2, entries
    assert entries[1]["first_epoch"] >= 1


def metrics(run):
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def children(pid):
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def until(ready, agents, folder, seconds=300):
    """Wait until `ready()`, while the agents live."""
    end = time.monotonic() + seconds
    while not ready():
        said = "\n".join(file.read_text() for file in folder.glob("*.txt"))
        assert time.monotonic() < end, said
        assert all(agent.poll() is None for agent in agents), said
        time.sleep(0.05)
