"""A manifest of 100,000 shards: opened in seconds, and its steps found without a list of samples.

Times are those of the process, which other processes on the machine hardly change.
"""

import json
import subprocess
import sys

OPEN = """
import json, sys, time
from pathlib import Path
from sr4ir_dist.data.order import Order
from sr4ir_dist.data.splits import open_split

seconds = {}

def timed(name, act):
    begin = time.process_time()
    value = act()
    seconds[name] = time.process_time() - begin
    return value

shards = timed("read", lambda: open_split(sys.argv[1], "train").manifest.shards)
rows = [shard.batch_rows for shard in shards]
groups = [shard.batch_groups for shard in shards]
steps = {}
for kind, given in (("plain", None), ("grouped", groups)):
    order = timed(
        f"{kind}: order",
        lambda: Order(rows, batch_groups=given, seed=1, batch_size=512, shuffle=True),
    )
    middle = order.steps_per_epoch // 2
    timed(f"{kind}: first step", lambda: order.share(1, 0, 3, 8))
    batch = timed(f"{kind}: any step", lambda: order.global_batch(1, middle))
    assert len(set(batch.tolist())) == 512
    assert set(order.locate(batch)[0]) <= set(range(len(shards)))
    steps[kind] = order.steps_per_epoch
# Not getrusage, whose peak a process inherits from the one that started it.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
rows = sum(shard.rows for shard in shards)
print(json.dumps({"seconds": seconds, "steps": steps, "rows": rows, "peak": peak}))
"""


def test_a_hundred_thousand_shards(tmp_path):
    # 50 kinds of shards of 16 to 20 record batches; the text is put together by hand because
    # writing such a manifest takes longer than reading it.
    kinds = []
    for kind in range(50):
        rows = [40 + (7 * kind + i) % 21 for i in range(16 + kind % 5)]
        groups = [(kind + i) % 8 for i in range(len(rows))]
        entry = {"rows": sum(rows), "bytes": 96 << 20, "batch_rows": rows, "batch_groups": groups}
        kinds.append(json.dumps(entry, indent=1)[1:])
    shards = ",".join(
        f'{{"path": "part-{i:05d}.arrow", "sha256": "{i:064x}",{kinds[i % 50]}'
        for i in range(100_000)
    )
    head = {"name": "x", "split": "train", "tasks": ["images", "detection"], "class_names": ["a"]}
    head |= {"source": {}, "format_version": 2}
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "manifest.json").write_text(
        f'{json.dumps(head)[:-1]}, "shards": [{shards}]}}'
    )
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(told)
    rows, seconds = told["rows"], told["seconds"]
    assert told["steps"] == {"plain": -(-rows // 512), "grouped": rows // 512}
    assert told["peak"] < 1 << 30
    # Measured: 1.4 s to read and check, 0.06 and 0.21 s for the orders, 0.5 s for an epoch's first
    # step, which draws the epoch, and 1 ms for any other.
    for kind in ("plain", "grouped"):
        assert seconds["read"] + seconds[f"{kind}: order"] < 5
        assert seconds[f"{kind}: first step"] < 2
        assert seconds[f"{kind}: any step"] < 0.1
