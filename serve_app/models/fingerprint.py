"""Which model a state belongs to: a state of one is never given to another."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from serve_app.models.interface import RecurrentModel


def fingerprint(model: RecurrentModel, options: Mapping[str, Any]) -> str:
    """A text that differs where the class, its options, the weights, or shapes and dtypes of weights or state do.

    Where the weights were read from does not matter. Those of a class that is no torch module are known by its options
    only, unless it has an `identity`.
    """
    kind, weights = type(model), {}
    if (identity := getattr(model, "identity", None)) is not None:
        options = {"identity": identity}
    if isinstance(model, torch.nn.Module):
        weights = model.state_dict()
        options = {name: value for name, value in options.items() if name != "weights"}
    found = hashlib.blake2b(digest_size=16)
    about = (kind.__module__, kind.__qualname__, sorted(options.items()), model.input, dict(model.outputs))
    shapes = [(tuple(leaf.shape), leaf.dtype) for leaf in pytree.tree_leaves(model.initial_state(1))]
    found.update(repr((about, shapes)).encode())
    for name, tensor in sorted(weights.items()):
        found.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
