import sys

import pytest

from sr4ir_dist.benchmark.processes import RankError, run_together

PROGRAM = """
import sys, time
if sys.argv[1] == "1":
    sys.exit("nothing to do")
time.sleep(60)
"""


def test_a_rank_that_fails_ends_the_others_and_is_told(tmp_path):
    command = [sys.executable, "-c", PROGRAM]
    with pytest.raises(RankError, match=r"code 1: nothing to do"):
        run_together(command, ranks=2, threads=1, folder=str(tmp_path))


def test_ranks_that_take_too_long_are_ended(tmp_path):
    command = [sys.executable, "-c", PROGRAM]
    with pytest.raises(RankError, match="did not end in 1 s"):
        run_together(command, ranks=1, threads=1, folder=str(tmp_path), limit_s=1)
