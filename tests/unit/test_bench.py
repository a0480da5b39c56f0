"""That the benches run and report; never how fast anything is."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import pytest
import torch

from bench import bert_study, fused_rnn, report
from bench.bert import Setting
from bench.saturation import Event, drawn, row_of, shares
from bench.sender import Sender
from serve_app.config import AppConfig, EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.host_env import REPLICA_ENV
from tests.fakes import SumModel

ROOT = Path(__file__).parents[2]


def test_a_report_says_what_ran_where(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    report.save({"ratio": 0.5}, file)
    written = json.loads(file.read_text())
    assert written.keys() == {"hardware", "commit", "figures"}
    assert written["figures"] == {"ratio": 0.5}
    assert written["hardware"].keys() >= {"cpu", "cores", "memory_gib", "gpu", "python", "torch", "ray", *REPLICA_ENV}
    assert written["commit"]


def test_without_a_file_nothing_is_written() -> None:
    report.save({"ratio": 0.5}, None)


def test_a_table_has_its_columns_in_line() -> None:
    text = report.table(["name", "rate"], [["a", 12345.6], ["longer", 0.12345]])
    assert text.splitlines() == ["name      rate", "------  ------", "a       12,346", "longer   0.123"]


def test_the_sender_acknowledges_what_it_has() -> None:
    engine = Engine(SumModel(), AppConfig(engine=EngineConfig(device="cpu", slots=4)))
    sender = Sender(engine, 300)
    sessions = np.arange(0, 300, 3)
    for i in range(1, 4):
        (answer,) = sender.exchange(sender.frame(sessions, np.ones((100, 2, 2), np.int64)))
        assert answer.start.tolist() == [2 * i - 2] * 100
        assert answer.outputs["total"][:, 0].tolist() == [2 * i - 1, 2 * i] * 100
    assert engine.gauges()["retained_bytes"] == 100 * 2 * 16
    sender.ack(sessions)
    assert engine.gauges()["retained_bytes"] == 0
    sender.abort()
    assert engine.gauges()["sessions_open"] == 0
    engine.check()


def test_the_engine_bench_writes_all_figures(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    command = [sys.executable, "-m", "bench.engine", "--seconds", "0.01", "--max-batch", "16"]
    command += ["--idle-sessions", "600", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert {name: written["hardware"][name] for name in REPLICA_ENV} == REPLICA_ENV
    figures = written["figures"]
    assert all(isinstance(value, float) for value in figures.values())
    claimed = {"engine_vs_module_lstm", "engine_vs_module_silero", "scheduler_us", "idle_bytes_ratio"}
    assert figures.keys() >= {*claimed, "engine_p50_ms_lstm_b1_k1", "engine_timesteps_per_ms_silero_b16_k10"}
    assert figures["idle_max_error"] <= 1e-5


def test_a_trace_is_split_into_the_longest_kernel_the_others_and_nothing() -> None:
    events = [
        event
        for step in range(8)
        for event in (
            Event("kernels", "lstm", 100.0 * step, 70.0),
            Event("to the device", "Memcpy HtoD (Pinned -> Device)", 100.0 * step + 10, 30.0),
            Event("kernels", "top_k", 100.0 * step + 75, 20.0),
        )
    ]
    expected = {"traced_step_us": 100.0, "main_kernel_us": 70.0, "other_kernels_us": 20.0, "no_kernel_us": 10.0}
    assert shares(events) == expected
    assert drawn(events)[:3] == [(row, name, start - 200, us) for row, name, start, us in events[6:9]]
    assert row_of("Memcpy DtoH (Device -> Pinned)") == "to the host"


@pytest.mark.parametrize("setting", fused_rnn.SETTINGS, ids=lambda setting: setting.name)
def test_cells_give_what_the_fused_layers_give(setting: fused_rnn.Setting) -> None:
    ways = fused_rnn.runs(setting, fused_rnn.QUICK_SIZES, "cpu", torch.float32)
    results = {name: run() for name, run in ways.items()}
    fused_rnn.check(setting, results)
    weights_and_x = 1 + 4 * setting.layers * setting.directions
    assert len(results["cells"]) == 1 + (weights_and_x if setting.mode == "training" else 0)
    assert results["cells"][0].shape == (5, 3, 16 * setting.directions)
    for wrong in (1.01, float("nan")):
        with pytest.raises(click.ClickException, match=f"output of {setting.name}, cells"):
            fused_rnn.check(setting, {**results, "cells": (results["cells"][0] * wrong, *results["cells"][1:])})


def test_the_bench_of_fused_layers_writes_all_figures(tmp_path: Path) -> None:
    file = tmp_path / "fused_rnn.json"
    command = [sys.executable, "-m", "bench.fused_rnn", "--quick", "--seconds", "0", "--device", "cpu"]
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())["figures"]
    assert "lstm_l1_d1_inference_cpu_fused" in figures
    ways = ("fused", "cells", "speedup")
    assert figures.keys() >= {f"{setting.name}_cpu_{way}" for setting in fused_rnn.SETTINGS for way in ways}


@pytest.mark.parametrize("published", fused_rnn.PUBLISHED.values(), ids=fused_rnn.PUBLISHED)
def test_what_was_published_is_of_settings_that_are_measured(published: dict[str, tuple[float, float]]) -> None:
    assert published.keys() <= {setting.name for setting in fused_rnn.SETTINGS}


def test_what_was_published_stands_beside_what_was_measured() -> None:
    measured = {"lstm_l5_d1_training_cpu_cells": 10.0, "lstm_l5_d1_training_cpu_fused": 30.0}
    head, rows = fused_rnn.columns({**measured, "lstm_l5_d1_training_cpu_speedup": 3.0}, "cpu")
    (row,) = (row for row in rows if row[:4] == ["lstm", 5, 1, "training"])
    assert dict(zip(head, row, strict=True)) == {
        "cell": "lstm", "layers": 5, "directions": 1, "": "training",
        "cell by cell": 10.0, "fused": 30.0, "speed-up": 3.0,
        "SKX-8180 cell by cell": 12.93, "SKX-8180 fused": 32.29, "SKX-8180 speed-up": pytest.approx(2.4973, abs=1e-4),
    }  # fmt: skip


def test_the_bench_of_batches_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "batched.json"
    command = [sys.executable, "-m", "bench.batched", "--seconds", "0.1", "--layers", "1", "--json", str(file)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    figures = json.loads(file.read_text())["figures"]
    assert figures.keys() == {"ragged_vs_padded", "dynamic_vs_single", "batched_max_diff"}


def test_the_bert_bench_writes_all_figures(tmp_path: Path) -> None:
    file = tmp_path / "bert.json"
    command = [sys.executable, "-m", "bench.bert", "--seconds", "0.05", "--length", "16", "--instances", "2"]
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    claimed = {"bert_dynamic_vs_1", "bert_vs_raw", "bert_low_load_over_raw_ms", "ragged_vs_padded"}
    assert written["figures"].keys() >= claimed
    assert written["workload"]["size"] == "mini"
    assert written["runs"]["instances=2"]["loads"]["dynamic"]["mean_batch"] > 1


def test_the_parts_of_a_request_over_grpc_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bert_study, "WITH_RAY", False)
    monkeypatch.setattr(bert_study, "WARM_UP_S", 0.05)
    kinds = {name: bert_study.Kind(name, 2, {"max_batch_size": size}, (1, 3)) for name, size in (("a", 2), ("b", 4))}
    monkeypatch.setattr(bert_study, "KINDS", kinds)
    by_kind = bert_study.points_of(Setting("mini", 8, "cpu", "fp32"), 0.3)
    points = by_kind["b"]
    assert {point.mean_batch for point in by_kind["a"]} == {2.0}
    assert [point.outstanding for point in points] == [1, 3]
    for point in points:
        assert sum(point.parts_ms.values()) == pytest.approx(point.mean_ms)
        assert all(part > -0.01 for part in point.parts_ms.values())  # the server's are whole µs
        assert 2 <= point.mean_batch <= 4


def test_the_study_has_eight_pictures(tmp_path: Path) -> None:
    points = [
        asdict(bert_study.Point(n, 10.0 * n, 2.0, 2.0, 3.0, 1.0, {part: n / 6 for part in bert_study.PARTS}))
        for n in (1, 2, 4)
    ]
    file = tmp_path / "study.json"
    by_kind = dict.fromkeys(bert_study.KINDS, points)
    file.write_text(json.dumps({"tables": {f"BERT mini, {length} tokens": by_kind for length in (8, 16)}}))
    bert_study.draw(file)
    assert sorted(picture.name for picture in (tmp_path / "study").iterdir()) == [f"figure{i}.png" for i in range(1, 9)]
