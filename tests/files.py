"""Small models in files, to test with. They all do the same: h' = tanh(x W + h U), y = 2 h'."""

import warnings
from pathlib import Path

import torch

INPUT, HIDDEN = 4, 6


class Cell(torch.nn.Module):
    """One timestep: x [B, 4], h [B, 6] -> y, h."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = torch.nn.Parameter(torch.randn(INPUT, HIDDEN, generator=generator))
        self.u = torch.nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator) / 3)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(x @ self.w + h @ self.u)
        return 2 * h, h


class Layer(Cell):
    """Any number of timesteps: x [B, T, 4], state ([1, B, 6],), scale -> {y: [B, T, 6], h: [1, B, 6]}."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, state: tuple[torch.Tensor], scale: int
    ) -> dict[str, torch.Tensor]:
        h = state[0][0]
        steps = []
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] @ self.w + h @ self.u)
            steps.append(scale * h)
        return {"y": torch.stack(steps, 1), "h": h[None]}


def expected(x: torch.Tensor) -> torch.Tensor:
    """What they make of x [T, B, 4]: y [T, B, 6]."""
    cell, h, steps = Cell(), torch.zeros(x.shape[1], HIDDEN), []
    with torch.no_grad():
        for timestep in x:
            y, h = cell(timestep, h)
            steps.append(y)
    return torch.stack(steps)


FLOAT, DOUBLE, INT64 = 1, 11, 7
"""As ONNX has them."""


def save_onnx(path: Path, batch: int | str = "batch", dtype: int = FLOAT, next_size: int = HIDDEN) -> None:
    """Inputs x [batch, 4], h [batch, 6], scale; outputs y [batch, 6], h_next."""
    import onnx
    from onnx import helper, numpy_helper

    cell, kind = Cell(), helper.tensor_dtype_to_np_dtype(dtype)
    weights = {
        name: numpy_helper.from_array(p.detach().numpy().astype(kind), name) for name, p in cell.named_parameters()
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("MatMul", ["h", "u"], ["hu"]),
        helper.make_node("Add", ["xw", "hu"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["h_new"]),
        helper.make_node("Mul", ["h_new", "scale"], ["y"]),
        helper.make_node("Slice", ["h_new", "zero", "end", "one"], ["h_next"]),
    ]
    for name, value in (("zero", 0), ("one", 1), ("end", next_size)):
        weights[name] = helper.make_tensor(name, INT64, [1], [value])
    graph = helper.make_graph(
        nodes,
        "cell",
        [
            helper.make_tensor_value_info("x", dtype, [batch, INPUT]),
            helper.make_tensor_value_info("h", dtype, [batch, HIDDEN]),
            helper.make_tensor_value_info("scale", dtype, []),
        ],
        [
            helper.make_tensor_value_info("y", dtype, [batch, HIDDEN]),
            helper.make_tensor_value_info("h_next", dtype, [batch, None]),
        ],
        [*weights.values()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)


def save_script(path: Path, module: torch.nn.Module | None = None) -> None:
    """Layer, or another module, as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module or Layer()), path)  # type: ignore[no-untyped-call]


def save_exported(path: Path, *, dynamic: bool = True) -> None:
    """Cell by torch.export."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    sizes = {"x": {0: batch}, "h": {0: batch}} if dynamic else None
    program = torch.export.export(Cell(), (torch.zeros(2, INPUT), torch.zeros(2, HIDDEN)), dynamic_shapes=sizes)
    torch.export.save(program, path)
