"""A run to publish, and hubs of each kind to publish it in."""

import pytest
from small_runs import publish_run


@pytest.fixture
def run(tmp_path):
    """A run that was judged at its newest checkpoint."""
    publish_run(tmp_path / "run", top1=91.75, psnr=19.5)
    return str(tmp_path / "run")


@pytest.fixture(params=["folder", "s3", "s3rver"])
def hub(request, tmp_path):
    """The root of an empty hub of each kind."""
    if request.param == "folder":
        return str(tmp_path / "hub")
    return request.getfixturevalue(request.param)() + "/hub"
