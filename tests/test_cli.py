"""What all jobs have of the command line."""

import pytest

from sr4ir_dist.cli import refuse_job_folder


def test_a_submitted_job_takes_no_place_in_its_own_folder(monkeypatch):
    places = ("datasets/drawn", "/shared/drawn", "s3://bucket/drawn")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    refuse_job_folder(*places, option="--data")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    refuse_job_folder(*places[1:], option="--data")
    with pytest.raises(ValueError, match="--data datasets/drawn: a submitted job runs in a folder"):
        refuse_job_folder(*places, option="--data")
