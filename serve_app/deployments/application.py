"""The Serve application: the owners of each model and an ingress, from one configuration."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from serve_app.config import AppConfig, load_models
from serve_app.deployments.batched import Batched
from serve_app.deployments.ingress import Ingress
from serve_app.deployments.recurrent import Recurrent
from serve_app.deployments.transport import NAMESPACE
from serve_app.engine.host_env import REPLICA_ENV

MAX_CALLS = 10_000
"""Of a replica at once. A session's bounds are kept by the engine, so Serve's own limit stays out of the way."""

QUIET = LoggingConfig(enable_access_log=False)
"""A line a call would cost more than the call."""

ONE_THREAD = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""Nothing in these processes blocks, and an engine has a thread of its own: calls need not change to another one."""

OWNER_ENV = {**REPLICA_ENV, **ONE_THREAD}
"""Of a process with an engine."""


def build(args: Mapping[str, Any]) -> Application:
    """The application that `args` configure (see serve_app.config). Raises ConfigError.

    The owners of a model are the deployment Recurrent, or Recurrent-NAME where `models` are configured; the replicas of
    a stateless one Batched, or Batched-NAME.
    """
    configs = load_models(args)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=next(iter(configs.values())).ingress_replicas,
        max_ongoing_requests=MAX_CALLS,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=10,
        health_check_period_s=2,
        logging_config=QUIET,
        ray_actor_options={"num_cpus": 0.5, "runtime_env": {"env_vars": ONE_THREAD}},
    )(Ingress)
    recurrent = {name: config for name, config in configs.items() if config.batching is None}
    application: Application = ingress.bind(
        [_model(Recurrent, config).bind(config, tuple(recurrent)) for config in recurrent.values()],
        {name: _model(Batched, config).bind(config) for name, config in configs.items() if name not in recurrent},
        next(iter(configs.values())).grpc,
        {name: _name(Recurrent if name in recurrent else Batched, config) for name, config in configs.items()},
    )
    return application


def _name(replica: type[Any], config: AppConfig) -> str:
    return "-".join(filter(None, (replica.__name__, config.model.served_as)))


def _model(replica: type[Any], config: AppConfig) -> Any:
    """The deployment of one of the application's models."""
    return serve.deployment(
        name=_name(replica, config),
        **_replicas(config),
        max_ongoing_requests=MAX_CALLS,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=10,
        health_check_period_s=2,  # where a replica has died the next should come soon
        logging_config=QUIET,
        ray_actor_options={
            "num_gpus": config.num_gpus,
            "accelerator_type": config.accelerator_type or None,
            "runtime_env": {"env_vars": OWNER_ENV},
        },
    )(replica)


def _replicas(config: AppConfig) -> dict[str, Any]:
    """How many there are. Where that is scaled no `initial_replicas`: to deploy anew must not go back to so many."""
    scaling = config.autoscaling
    if scaling is None:
        return {"num_replicas": config.replicas}
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="serve_app.deployments.autoscaling:DirectoryPolicy",
        policy_kwargs={"model": config.model.served_name, "namespace": NAMESPACE},
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
            policy=policy,
        )
    }
