"""Whose voice is it: the GE2E speaker encoder (Wan et al. 2018, arXiv:1710.10467) of Resemblyzer (Apache-2.0)."""

from collections.abc import Mapping

import numpy as np
import torch

from serve_app.errors import ConfigError
from serve_app.models.interface import State
from serve_app.models.options import SpeakerOptions
from serve_app.models.packages import package_file
from serve_app.spec import TensorSpec

HOP, WINDOW, MELS, HIDDEN, LAYERS = 160, 400, 40, 256, 3
KEPT = WINDOW - HOP
INSTALL = "pip install --no-deps resemblyzer==0.1.4"


class SpeakerEncoder(torch.nn.Module):
    """An LSTM over mel frames of 25 ms, one each 10 ms, with the state outside and batched over time.

    A timestep is `frames` times 160 samples at 16 kHz; its embedding is of all that was heard so far. The dot product
    of two embeddings says how alike two voices are.
    """

    takes_views = True
    sample_rate = 16000
    outputs: Mapping[str, TensorSpec] = {"embedding": TensorSpec((HIDDEN,))}

    def __init__(self, options: SpeakerOptions) -> None:
        """Raises ConfigError if the package resemblyzer is not installed, or is too different."""
        super().__init__()
        self.frames = options.frames
        self.input = TensorSpec((options.frames * HOP,))
        self.window: torch.Tensor
        self.filters: torch.Tensor
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("filters", torch.from_numpy(mel_filters().T.copy()), persistent=False)
        self.lstm = torch.nn.LSTM(MELS, HIDDEN, LAYERS)
        self.linear = torch.nn.Linear(HIDDEN, HIDDEN)
        path = package_file("resemblyzer", "pretrained.pt")
        if path is None:
            raise ConfigError(f"model=speaker takes its weights from a package that is not there: {INSTALL}")
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
            self.load_state_dict({name: found[name] for name in self.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise ConfigError(f"{path} is not that of resemblyzer 0.1.4, which {INSTALL} installs: {error}") from error
        self.requires_grad_(False)

    def initial_state(self, batch: int) -> State:
        """Zeros: h and c [3, batch, 256], the last samples heard [batch, 240]."""
        zeros = self.window.new_zeros
        return zeros(LAYERS, batch, HIDDEN), zeros(LAYERS, batch, HIDDEN), zeros(batch, KEPT)

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """x [T, B, frames * 160] -> embedding of length 1 [T, B, 256]."""
        h, c, before = state
        heard = torch.cat([before, x.transpose(0, 1).flatten(1)], 1)
        spectra = torch.fft.rfft(heard.unfold(1, WINDOW, HOP).transpose(0, 1) * self.window)  # [T * frames, B, 201]
        mels = (spectra.real.square() + spectra.imag.square()) @ self.filters
        y, (h, c) = self.lstm(mels, (h, c))
        last = y[self.frames - 1 :: self.frames]
        return torch.nn.functional.normalize(self.linear(last).relu(), dim=-1), (h, c, heard[:, -KEPT:])


def mel_filters(sample_rate: int = 16000) -> np.ndarray:
    """Slaney's mel filters [40, 201], of equal area, as librosa has them by default."""

    def mel_to_hz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = 15 + np.log(sample_rate / 2 / 1000) * 27 / np.log(6.4)
    edges = mel_to_hz(np.linspace(0, top, MELS + 2))[:, None]
    hz, widths = np.fft.rfftfreq(WINDOW, 1 / sample_rate), np.diff(edges, axis=0)
    rising, falling = (hz - edges[:-2]) / widths[:-1], (edges[2:] - hz) / widths[1:]
    heights = 2 / (edges[2:] - edges[:-2])
    filters: np.ndarray = np.maximum(0, np.minimum(rising, falling)) * heights
    return filters.astype(np.float32)
