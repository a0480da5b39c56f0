"""What `serve run` is given: `serve run configs/vad.yaml`, or `serve run serve_app.app:build model=silero_vad`."""

from serve_app.deployments.application import build

__all__ = ["build"]
