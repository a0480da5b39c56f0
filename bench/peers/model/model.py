"""A 2x256 LSTM for Triton's Python backend, as a user of Triton would write it: states by correlation id.

Requests have x [T, 256]; those of a call may differ in T where the configuration lets them (they are padded here).
"""

import json
import os
import sys

sys.path[:0] = os.environ["LOCKSTEP_PEERS_PATH"].split(":")  # the backend ignores PYTHONPATH

import torch  # noqa: E402
import triton_python_backend_utils as backend  # noqa: E402


class TritonPythonModel:
    def initialize(self, args):
        torch.set_num_threads(1)
        parameters = json.loads(args["model_config"])["parameters"]
        options = {name: int(value["string_value"]) for name, value in parameters.items()}
        torch.manual_seed(options["seed"])
        self.lstm = torch.nn.LSTM(options["input"], options["hidden"], options["layers"]).eval()
        self.states = {}
        self.zero = torch.zeros(options["layers"], options["hidden"])

    def execute(self, requests):
        found = iter(self.run([request for request in requests if request.correlation_id()]))
        # The direct strategy fills its batches up with requests that are nobody's.
        return [next(found) if request.correlation_id() else self.none() for request in requests]

    def none(self):
        zero = torch.zeros_like(self.zero[None, :1])
        tensor = backend.Tensor.from_dlpack("y", torch.utils.dlpack.to_dlpack(zero))
        return backend.InferenceResponse([tensor])

    @torch.inference_mode()
    def run(self, requests):
        xs, ids = [], []
        for request in requests:
            x = torch.from_dlpack(backend.get_input_tensor_by_name(request, "x").to_dlpack())
            xs.append(x[0] if x.dim() == 3 else x)
            ids.append(request.correlation_id())
            if request.flags() & backend.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
                self.states[ids[-1]] = self.zero, self.zero
        h, c = (torch.stack([self.states[each][i] for each in ids], 1) for i in (0, 1))
        lengths = [len(x) for x in xs]
        if len(set(lengths)) == 1:
            y, (h, c) = self.lstm(torch.stack(xs, 1), (h, c))
        else:
            packed = torch.nn.utils.rnn.pack_sequence(xs, enforce_sorted=False)
            y, (h, c) = self.lstm(packed, (h, c))
            y, _ = torch.nn.utils.rnn.pad_packed_sequence(y)
        responses = []
        for i, request in enumerate(requests):
            if request.flags() & backend.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
                del self.states[ids[i]]
            else:
                self.states[ids[i]] = h[:, i], c[:, i]
            out = torch.empty(1, lengths[i], y.shape[2])  # with the strides that Triton insists on
            out[0] = y[: lengths[i], i]
            tensor = backend.Tensor.from_dlpack("y", torch.utils.dlpack.to_dlpack(out))
            responses.append(backend.InferenceResponse([tensor]))
        return responses
