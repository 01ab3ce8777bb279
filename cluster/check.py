"""Checks gpu.yaml, local.yaml (`ray up`) and serve.yaml (`serve deploy`) offline, against the
schemas that Ray and AWS ship: one line per file, or one per error and exit status 1. Serve's
schema, and Ray's for a provider, let an unknown key pass; here it is an error.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import yaml
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
from click import ClickException
from jsonschema import Draft7Validator
from ray import autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

SCHEMA = json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text())


def cluster_errors(config: dict[str, Any]) -> Iterator[str]:
    """What `ray up` would refuse, or overlook, in a cluster file."""
    if errors := [*Draft7Validator(SCHEMA).iter_errors(config)]:
        yield from (f"{error.json_path}: {error.message}" for error in errors)
        return
    provider = SCHEMA["properties"]["provider"]["properties"]
    yield from _unknown(config["provider"], provider, "$.provider", depth=1)
    if config["provider"]["type"] == "aws":
        ec2 = ServiceModel(Loader().load_service_model("ec2", "service-2"), "ec2")
        call = ec2.operation_model("RunInstances").input_shape
        for name, node in config["available_node_types"].items():
            request = node["node_config"] | {"MinCount": 1, "MaxCount": 1}
            if (report := ParamValidator().validate(request, call)).has_errors():
                yield f"$.available_node_types.{name}.node_config: {report.generate_report()}"
    try:
        validate_config(prepare_config(config))
    except (AssertionError, RuntimeError, ValueError, ClickException) as error:
        yield str(error)


def serve_errors(config: dict[str, Any]) -> Iterator[str]:
    """What `serve deploy` would refuse, or overlook, in its file."""
    try:
        read = ServeDeploySchema.model_validate(config).model_dump(exclude_unset=True)
        yield from _unknown(config, read, "$")
        deployments = [d for app in config["applications"] for d in app.get("deployments", [])]
        for deployment in deployments:
            scaling = deployment.get("autoscaling_config", {})
            read = AutoscalingConfig.model_validate(scaling).model_dump()
            yield from _unknown(scaling, read, f"$.{deployment['name']}.autoscaling_config")
    except pydantic.ValidationError as error:
        yield from (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def _unknown(raw: Any, read: Any, path: str, depth: int = 99) -> Iterator[str]:
    """The keys of `raw` that are not in `read`, down to `depth`."""
    if isinstance(raw, list):
        raw, read = dict(enumerate(raw)), dict(enumerate(read))
    if isinstance(raw, dict) and isinstance(read, dict) and depth:
        for key, value in raw.items():
            if key in read:
                yield from _unknown(value, read[key], f"{path}.{key}", depth - 1)
            else:
                yield f"{path}: unknown key {key!r}"


if __name__ == "__main__":
    failed = False
    for name in ("gpu.yaml", "local.yaml", "serve.yaml"):
        config = yaml.safe_load(Path(__file__).with_name(name).read_text())
        errors = list(serve_errors(config) if name == "serve.yaml" else cluster_errors(config))
        print(*[f"cluster/{name}: {e}" for e in errors or ["as Ray reads it"]], sep="\n")
        failed |= bool(errors)
    sys.exit(failed)
