from collections.abc import Iterator

import pytest
import torch

from serve_app.config import load_config
from serve_app.engine.build import build_engine


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
