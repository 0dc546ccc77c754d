"""Run as a program: launches a node of each type of a cluster file, as `ray up` would.

Ray's own AWS provider does it, wherever AWS_ENDPOINT_URL points to. Prints what EC2 then tells of
the instances, by node type, and the types' resources, as JSON.
"""

import copy
import json
import sys
from pathlib import Path

import boto3
import yaml
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config


def main(file: str) -> None:
    config = prepare_config(yaml.safe_load(Path(file).read_text()))
    config = AWSNodeProvider.fillout_available_node_types_resources(config)
    validate_config(config)
    make_profiles(config)
    config = bootstrap_aws(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node_type in config["available_node_types"].items():
        provider.create_node(copy.deepcopy(node_type["node_config"]), {"node-type": name}, 1)
    told = {}
    for reservation in boto3.client("ec2").describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
            resources = config["available_node_types"][tags["node-type"]]["resources"]
            told[tags["node-type"]] = instance | {"Tags": tags, "resources": resources}
    print(json.dumps(told, default=str))


def make_profiles(config: dict) -> None:
    """The instance profiles that the file names, as the README makes them."""
    iam = boto3.client("iam")
    types = config["available_node_types"].values()
    for name in {each["node_config"]["IamInstanceProfile"]["Name"] for each in types}:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


if __name__ == "__main__":
    main(sys.argv[1])
