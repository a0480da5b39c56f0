"""A Ray cluster of its own with one application, until its process is killed. See test_durable.py."""

import logging
import signal
import sys

import ray
from ray import serve

from serve_app.app import build


def main(folder: str, port: str, store: str) -> None:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, _temp_dir=folder)
    serve.start(http_options={"port": int(port)}, logging_config={"log_level": "ERROR"})
    model = {"name": "rnn", "input": 8, "hidden": 16, "layers": 2, "seed": 3}
    arguments = {"model": model, "durability": {"store": store}, "session": {"checkpoint_timesteps": 20}}
    serve.run(build(arguments), name="lasting", route_prefix="/")
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
