"""Training on real nodes under faults drawn at random: killed, cut off, taken away, added.

The runs end, no step is lost and none counts twice; where the number of ranks is fixed, weights,
optimizers and history are those of a run that nothing happened to, bit for bit.
"""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import step_records
import torch
from hosts import HEALTH_CHECKS, Hosts, Node, hosts, missing, tail, wait_until
from step_records import Step

from sr4ir_dist import checkpoint

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.timeout(5400),
]
FIXED, ELASTIC = "2", "1:3"
# At least so many nodes for workers, so that a spare one takes over from one that is lost.
NODES = 3
STEPS_PER_EPOCH = 12
PACE = 0.3  # seconds that each step rests until the last fault
PROGRAM = Path(__file__).with_name("step_records.py")


@dataclass
class Run:
    """A training command on the head, which is given again whenever it ended without a result."""

    hosts: Hosts
    arguments: list[str]
    folder: Path
    elastic: bool = False
    driver: Any = None
    ended: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder / "driver.log"

    def begin(self) -> None:
        words = [str(PROGRAM), str(self.folder), *self.arguments, "--address", self.hosts.address]
        self.driver = self.hosts.start(self.hosts.head, *words, log=self.log)

    def steps(self) -> list[Step]:
        return step_records.read(self.folder)

    def reached(self) -> int:
        return max((step.step for step in self.steps()), default=0)

    def wait_for_steps(self, count: int) -> None:
        """Returns once the run is so many steps further than it ever was."""
        target = self.reached() + count

        def there() -> bool:
            if self.driver.poll() is not None:
                assert self.driver.returncode, "training ended before the last fault"
                told = [line for line in tail(self.log, 80).splitlines() if "error: " in line]
                self.ended.append(f"at step {self.reached()}: {' '.join(told[-1:])}")
                self.begin()
            return self.reached() >= target

        try:
            wait_until(there, seconds=300, what=f"step {target}")
        except TimeoutError as error:
            raise AssertionError(f"{error}:\n{tail(self.log, 80)}") from error

    def training(self) -> list[Node]:
        """The nodes that training workers run on; waits for one."""

        def found() -> list[Node]:
            return [node for node in self.hosts.workers if self.hosts.training_workers(node)]

        wait_until(lambda: found() != [], seconds=200, what="a training worker")
        return found()

    def replace(self) -> None:
        """Add a node for one that is lost, at once where the run could not go on without."""
        if not self.elastic:
            self.hosts.add()

    @contextmanager
    def slowed(self, seconds: float = PACE) -> Iterator[None]:
        """Let each step rest, so that the run does not end before something happened to it."""
        pace = self.folder / "pace"
        pace.write_text(str(seconds))
        yield
        pace.unlink()

    def finish(self) -> dict[str, Any]:
        """Wait for the result."""
        assert self.driver.wait(1200) == 0, tail(self.log, 80)
        return json.loads((self.folder / "result.json").read_text())

    def repair(self) -> None:
        """Replace the nodes where Ray does not run any more."""
        for node in list(self.hosts.workers):
            if node in self.hosts.severed or self.hosts.node_id(node) is None:
                self.hosts.kill(node)
        while len(self.hosts.workers) < NODES:
            self.hosts.add()


def kill_worker(run: Run, draw: random.Random) -> str:
    node = draw.choice(run.training())
    run.hosts.kill_worker(node)
    return node.address


def kill_starting_worker(run: Run, draw: random.Random) -> str:
    """Kill one, and one of those that are to take over, before they train."""
    before = {pid for node in run.training() for pid in run.hosts.training_workers(node)}
    kill_worker(run, draw)

    def new() -> list[Node]:
        found = run.training()
        pids = {node: set(run.hosts.training_workers(node)) - before for node in found}
        return [node for node in found if pids[node]]

    wait_until(lambda: new() != [], seconds=100, what="new training workers")
    seconds = draw.uniform(0, 8)
    time.sleep(seconds)
    node = draw.choice(new() or run.training())
    run.hosts.kill_worker(node)
    return f"{node.address}, after {seconds:.1f} s"


def kill_node(run: Run, draw: random.Random) -> str:
    return lose(run, draw, run.hosts.kill)


def lose(run: Run, draw: random.Random, how: Callable[[Node], None]) -> str:
    node = draw.choice(run.training())
    how(node)
    run.replace()
    return node.address


def cut_and_heal(run: Run, draw: random.Random) -> str:
    node, seconds = draw.choice(run.training()), draw.uniform(2, 20)
    run.hosts.cut(node)
    time.sleep(seconds)
    run.hosts.heal(node)
    return f"{node.address} for {seconds:.0f} s"


def cut_for_good(run: Run, draw: random.Random) -> str:
    return lose(run, draw, run.hosts.cut)


def drain(run: Run, draw: random.Random) -> str:
    """As spot machines: a notice, and at its end the node is gone."""
    node, seconds = draw.choice(run.training()), draw.randint(5, 12)
    told = time.monotonic()
    run.hosts.drain(node, seconds=seconds)
    run.replace()
    time.sleep(max(0.0, told + seconds - time.monotonic()))
    run.hosts.kill(node)
    return f"{node.address}, told {seconds} s before"


def add_node(run: Run, draw: random.Random) -> str:
    return run.hosts.add().address


def kill_driver(run: Run, draw: random.Random) -> str:
    """Kill the command, and give it again."""
    run.driver.kill()
    run.driver.wait(30)
    run.begin()
    return ""


FAULTS: dict[str, Callable[[Run, random.Random], str]] = {
    "a worker is killed": kill_worker,
    "a worker is killed, and one that starts": kill_starting_worker,
    "a node is killed": kill_node,
    "a network is cut and healed": cut_and_heal,
    "a network is cut for good": cut_for_good,
    "a node is drained": drain,
    "a node is added": add_node,
    "the command is killed": kill_driver,
}


def disturb(run: Run, count: int, seed: int) -> list[dict[str, Any]]:
    """Do so many faults to a run that trains, each kind about as often; tells what became of it."""
    draw = random.Random(seed)
    kinds = list(FAULTS) * -(-count // len(FAULTS))
    draw.shuffle(kinds)
    began, told = time.time(), []
    for kind in kinds[:count]:
        run.wait_for_steps(draw.randint(2, 8))
        time.sleep(draw.uniform(0, 0.5))
        before, at, ended = run.steps(), time.time(), len(run.ended)
        detail = FAULTS[kind](run, draw)
        run.wait_for_steps(4)
        run.repair()
        told.append({"fault": kind, "where": detail, "seconds": round(at - began, 1)})
        told[-1] |= consequences(before, run.steps(), at) | {"command_ended": run.ended[ended:]}
        print(json.dumps(told[-1]), flush=True)
    return told


def consequences(before: list[Step], after: list[Step], at: float) -> dict[str, Any]:
    """What a fault at a time did to a run, by its steps until then and until some were done."""
    times = [before[-1].time, *(step.time for step in after if step.time > at)]
    pause = max(end - start for start, end in zip(times, times[1:], strict=False))
    attempts = sorted({step.attempt for step in after if step.time > at} - {before[-1].attempt})
    again = [min(step.step for step in after if step.attempt == name) for name in attempts]
    return {
        "step": max(step.step for step in before),
        "ranks_before": before[-1].ranks,
        "ranks_after": after[-1].ranks,
        "new_attempts": len(attempts),
        "continued_at_step": again,
        "longest_pause_seconds": round(pause, 1),
    }


def state(run_uri: str) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint: networks and optimizers."""
    saved = checkpoint.load(checkpoint.resolve(run_uri))
    names = [name for name in saved.files if name.endswith(".safetensors")]
    assert len(names) == 4
    return {f"{name}:{key}": t for name in names for key, t in saved.tensors(name).items()}


def samples_of_steps(steps: list[Step]) -> dict[int, list[str]]:
    return {
        number: step_records.samples(ranks) for number, ranks in step_records.applied(steps).items()
    }


@dataclass
class Pair:
    """A run that nothing happened to, and one that faults happened to."""

    undisturbed: dict[str, Any]
    result: dict[str, Any]
    wanted: dict[int, list[str]]
    found: dict[int, list[str]]
    faults: list[dict[str, Any]]
    ended: list[str]
    seconds: float


Soak = Callable[..., Pair]
Prepare = Callable[..., Run]


@pytest.fixture
def prepare(drawn, train_command) -> Iterator[Prepare]:
    """Makes a training command for hosts, of so many workers and epochs."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))

    def make(made: Hosts, name: str, workers: str, epochs: int) -> Run:
        into = folder / name
        into.mkdir()
        settings = [f"epochs={epochs}", "evaluation.every_epochs=5"]
        words = [word for setting in settings for word in ("--set", setting)]
        more = ["--workers", workers, "--max-failures", "1000", "--json", str(into / "result.json")]
        command = train_command(drawn, str(into / "runs"), *words, *more)
        return Run(made, command, into, elastic=workers == ELASTIC)

    yield make
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def soak(prepare: Prepare) -> Soak:
    """Trains twice, on 2 workers and then on some under so many faults drawn by a seed."""

    def train(workers: str, *, faults: int, seed: int, epochs: int) -> Pair:
        with hosts(workers=NODES) as made:
            plain = prepare(made, "plain", FIXED, epochs)
            plain.begin()
            undisturbed = plain.finish()
            wanted = samples_of_steps(plain.steps())

            run, started = prepare(made, "disturbed", workers, epochs), time.time()
            with run.slowed():
                run.begin()
                told = disturb(run, faults, seed)
            result = run.finish()
            seconds = time.time() - started
            found = samples_of_steps(run.steps())
        return Pair(undisturbed, result, wanted, found, told, run.ended, seconds)

    return train


def assert_all_steps_once(pair: Pair) -> None:
    """Every sample in every epoch once, and in the step that it belongs to."""
    assert pair.result["steps"] == pair.undisturbed["steps"] == len(pair.wanted)
    assert pair.found == pair.wanted
    assert_each_sample_once(pair.found)


def assert_each_sample_once(found: dict[int, list[str]]) -> None:
    """In every epoch."""
    steps = list(found)
    assert steps == list(range(1, len(steps) + 1))
    for first in range(0, len(steps), STEPS_PER_EPOCH):
        epoch = [name for step in steps[first : first + STEPS_PER_EPOCH] for name in found[step]]
        assert len(epoch) == len(set(epoch)) == 48


def assert_same_run(pair: Pair) -> None:
    assert pair.result["history"] == pair.undisturbed["history"]
    found, wanted = state(pair.result["run_uri"]), state(pair.undisturbed["run_uri"])
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.slow
def test_three_faults_change_nothing(soak):
    pair = soak(FIXED, faults=3, seed=83, epochs=8)
    assert pair.ended == []
    assert_all_steps_once(pair)
    assert_same_run(pair)


@pytest.mark.slow
def test_a_run_grows_by_a_node_that_is_added(prepare: Prepare):
    with hosts(workers=1) as made:
        run = prepare(made, "grown", "1:2", 12)
        with run.slowed(1.0):  # a run looks for more room once a minute
            run.begin()
            run.wait_for_steps(2)
            assert run.steps()[-1].ranks == 1
            made.add()
            wait_until(lambda: run.steps()[-1].ranks == 2, seconds=240, what="a second rank")
        result = run.finish()
        steps = run.steps()
    assert run.ended == []
    assert result["world_size"] == 2
    assert len({step.attempt for step in steps}) == 2
    # What the first attempt did was saved before it ended: nothing is done twice.
    assert len({(step.step, step.rank) for step in steps}) == len(steps)
    assert_each_sample_once(samples_of_steps(steps))


@pytest.mark.proof
def test_twenty_faults_change_nothing(soak, record):
    pair = soak(FIXED, faults=20, seed=1, epochs=40)
    tell(record, "soak", "2 ranks", pair)
    assert pair.ended == []
    assert_all_steps_once(pair)
    assert_same_run(pair)


@pytest.mark.proof
def test_twenty_faults_of_an_elastic_run_lose_no_sample(soak, record):
    pair = soak(ELASTIC, faults=20, seed=2, epochs=40)
    tell(record, "soak_elastic", "1 to 3 ranks", pair)
    assert pair.ended == []
    assert len({fault["ranks_after"] for fault in pair.faults}) > 1
    assert_all_steps_once(pair)


def tell(record: Any, name: str, ranks: str, pair: Pair) -> None:
    record(
        name,
        {
            "what": f"training with {ranks} on nodes in network namespaces of their own, under "
            "faults drawn by a seed; times are of a machine whose CPUs all nodes share",
            "health_checks": HEALTH_CHECKS,
            "steps": pair.result["steps"],
            "seconds": round(pair.seconds),
            "faults": pair.faults,
            "commands_that_ended": pair.ended,
            "every_sample_once_in_each_epoch": pair.found == pair.wanted,
            "same_history": pair.result["history"] == pair.undisturbed["history"],
        },
    )
