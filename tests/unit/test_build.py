from collections.abc import Iterator

import pytest
import torch

from serve_app.config import load_config
from serve_app.engine.build import build_engine
from serve_app.errors import ConfigError


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


@pytest.mark.parametrize("dtype", ["tf32", "fp32"])
def test_a_replica_multiplies_in_tf32_where_the_model_says_so_and_nowhere_else(dtype: str) -> None:
    engine = build_engine(load_config({"model": {"name": "rnn", "hidden": 8, "dtype": dtype}}))
    assert engine.spec.input.dtype == "float32"
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is (dtype == "tf32")


@pytest.mark.parametrize(
    ("setting", "least", "way_out"),
    [
        ("engine.max_retained_bytes", 1024 * 8 * 4, "session.max_segment_timesteps=1024 have 32768: .* to 1023"),
        ("engine.max_pending_bytes", 256 * 4, "a timestep of model 'rnn' has 1024: raise it"),
    ],
)
def test_a_replica_whose_bounds_a_legal_segment_can_never_keep_does_not_start(
    setting: str, least: int, way_out: str
) -> None:
    model = {"model": {"name": "rnn", "hidden": 8}}
    build_engine(load_config({**model, setting: least}))
    with pytest.raises(ConfigError, match=f"{setting} is {least - 1}, .*{way_out}"):
        build_engine(load_config({**model, setting: least - 1}))
