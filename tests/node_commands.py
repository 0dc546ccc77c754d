"""Run as a program, in namespaces of its own: a cluster file's start commands, as Ray runs them.

The head and one worker are loopback addresses of this machine. The worker is then given notice, by
EC2's metadata service or by the signal that the file names. Prints what the drain's log says.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import yaml
from metadata_service import Ec2Metadata

ROOT = Path(__file__).resolve().parents[1]


def fill(home: Path) -> None:
    """Make a node's home as file_mounts and setup_commands leave it."""
    (home / "venv").symlink_to(Path(sys.executable).parents[1])
    (home / "sr4ir_dist").symlink_to(ROOT)
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    (home / ".bashrc").write_text("source ~/venv/bin/activate\n")


def main(file: str, home: Path, temporary: str) -> None:
    config = yaml.safe_load((ROOT / file).read_text())
    fill(home)
    log = home / "drain_on_notice.log"
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with Ec2Metadata() as service:
        environment = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": service.endpoint,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Not /tmp/ray, where other clusters' addresses are looked for.
            "RAY_TMPDIR": temporary,
        }

        def run(command: str, address: str) -> None:
            # Nodes of one machine need addresses of their own; the autoscaler is not tested here.
            command = command.replace("ray start", f"ray start --node-ip-address={address}")
            command = command.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
            shell = ["bash", "--login", "-c", "-i", f"source ~/.bashrc; ({command})"]
            subprocess.run(shell, env=environment, stdin=subprocess.DEVNULL, check=True, cwd=home)

        for command in config["head_start_ray_commands"]:
            run(command, "127.0.0.1")
        for command in config["worker_start_ray_commands"]:
            if command != "ray stop":  # the head's, here
                run(f"export RAY_HEAD_IP=127.0.0.1; {command}", "127.0.0.2")
        wait_for(log, "waiting for ")
        pid = home / "drain_on_notice.pid"
        if pid.exists():
            subprocess.run(["kill", "-USR1", pid.read_text().strip()], check=True)
        else:
            service.announce("terminate", 100)
        wait_for(log, " is drained, ")
    print(log.read_text())


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (log.exists() and text in log.read_text()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {text!r} in the log: {log.read_text()}")
        time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
