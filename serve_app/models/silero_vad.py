"""Silero voice activity detection (https://github.com/snakers4/silero-vad, MIT): is there speech in this audio?"""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from serve_app.errors import ConfigError
from serve_app.models.interface import State
from serve_app.models.options import SileroOptions
from serve_app.spec import TensorSpec

HIDDEN = 128
INSTALL = "pip install --no-deps silero-vad==6.2.3"


class SileroVad(torch.nn.Module):
    """The network inside the package's `silero_vad.jit`, its weights too, with the state outside and batched over time.

    A timestep is 32 ms of audio: 512 samples at 16 kHz, 256 at 8 kHz, in [-1, 1]. `forward` is: magnitudes of four
    Hann windows over (end of the timestep before, timestep, its reflected end), four convolutions, an LSTM, a sigmoid.
    The package does the transform as a convolution with a fixed basis; an FFT gives the same in a third of the time.
    """

    takes_views = True

    def __init__(self, options: SileroOptions) -> None:
        """Raises ConfigError if the package silero-vad is not installed, or is too different."""
        super().__init__()
        self.sample_rate: int = options.sample_rate
        self.window_size = self.sample_rate * 16 // 1000  # samples
        self.context_size = self.window_size // 4
        self.input = TensorSpec((2 * self.window_size,))
        self.outputs: Mapping[str, TensorSpec] = {"probability": TensorSpec(())}

        self.window: torch.Tensor
        self.register_buffer("window", torch.hann_window(self.window_size), persistent=False)
        self.encoder = torch.nn.Sequential(
            *_conv(self.window_size // 2 + 1, 128), *_conv(128, 64, 2), *_conv(64, 64, 2), *_conv(64, 128)
        )
        # fused over T: at B=64, T=10 on a CPU in 0.4 of the time of a loop over LSTMCell, and one cuDNN call on a GPU
        self.lstm = torch.nn.LSTM(128, HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, 1)
        self.load_state_dict(_weights(self.sample_rate))
        self.to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]

    def initial_state(self, batch: int) -> State:
        """Zeros: h [batch, 128], c [batch, 128], context [batch, 64 or 32], the last samples heard."""
        zeros = self.window.new_zeros
        return zeros(batch, HIDDEN), zeros(batch, HIDDEN), zeros(batch, self.context_size)

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """x [T, B, 512 or 256] -> probability of speech [T, B]."""
        h, c, context = state
        tails = torch.cat([context[None], x[:, :, -self.context_size :]])  # [T + 1, B, 64]
        mirror = x[:, :, -self.context_size - 1 : -1].flip(-1)
        windows = torch.cat([tails[:-1], x, mirror], -1).unfold(-1, self.window_size, self.window_size // 2)
        spectra = torch.fft.rfft(windows * self.window).flatten(0, 1)  # [T * B, 4, 129]
        magnitudes = (spectra.real.square() + spectra.imag.square()).sqrt()  # in half the time of abs() on a CPU
        features = self.encoder(magnitudes.transpose(1, 2).unsqueeze(2))  # of channels last, [T * B, 128, 1, 1]
        y, (h, c) = self.lstm(features.view(len(x), -1, 128), (h[None], c[None]))
        return self.head(y.relu()).squeeze(-1).sigmoid(), (h[0], c[0], tails[-1])


def _conv(inputs: int, outputs: int, stride: int = 1) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A convolution over 3 windows, as a 2D one of height 1: only that runs in the layout that the FFT leaves."""
    return torch.nn.Conv2d(inputs, outputs, (1, 3), (1, stride), (0, 1)), torch.nn.ReLU(inplace=True)


def _weights(sample_rate: int) -> dict[str, torch.Tensor]:
    """State dict of SileroVad, out of the installed package, which is not imported."""
    package = importlib.util.find_spec("silero_vad")
    if package is None or package.origin is None:
        raise ConfigError(f"model=silero_vad takes its weights from a package that is not there: {INSTALL}")
    path = Path(package.origin).parent / "data" / "silero_vad.jit"
    prefix = "_model." if sample_rate == 16000 else "_model_8k."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is; other files there have other weights
            found = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        weights = {
            "head.weight": found[f"{prefix}decoder.decoder.2.weight"].squeeze(-1),
            "head.bias": found[f"{prefix}decoder.decoder.2.bias"],
        }
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            weights[f"lstm.{name}_l0"] = found[f"{prefix}decoder.rnn.{name}"]
        for i in range(4):
            weights[f"encoder.{2 * i}.weight"] = found[f"{prefix}encoder.{i}.reparam_conv.weight"].unsqueeze(2)
            weights[f"encoder.{2 * i}.bias"] = found[f"{prefix}encoder.{i}.reparam_conv.bias"]
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} is not that of silero-vad 6.2.3, which {INSTALL} installs: {error}") from error
    return weights
