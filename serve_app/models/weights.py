"""Weights out of a file into a module: a state dict (.pt, .pth) or safetensors. Nothing else is ever unpickled."""

from collections.abc import Mapping
from pathlib import Path

import torch

from serve_app.errors import ConfigError


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Copy the weights in the file into the module; raises ConfigError unless names and shapes are the same."""
    found, expected = read_weights(path), module.state_dict()
    for name, tensor in expected.items():
        if name not in found:
            raise ConfigError(
                f"model.weights={path} has no {name} (expected shape {list(tensor.shape)}); it has {_names(found)}"
            )
        if found[name].shape != tensor.shape:
            raise ConfigError(
                f"{name} in model.weights={path} has shape {list(found[name].shape)}, expected {list(tensor.shape)}: "
                "give the options of the model as the weights were trained"
            )
    if extra := found.keys() - expected.keys():
        raise ConfigError(f"model.weights={path} has {_names(extra)}, which these options have no place for")
    module.load_state_dict(found)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name. Raises ConfigError."""
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ConfigError(f"model.weights={path} ends in {path.suffix!r}: .pt, .pth and .safetensors can be read")
    if not path.is_file():
        raise ConfigError(f"model.weights={path} is not a file (looked in {Path.cwd()})")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file fails in zip, pickle, torch or safetensors, each with its own
        raise ConfigError(f"model.weights={path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ConfigError(f"model.weights={path} is not a state dict: torch.save(model.state_dict(), path) writes one")
    return dict(found)


def _names(tensors: Mapping[str, object] | set[str]) -> str:
    names = sorted(tensors)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"
