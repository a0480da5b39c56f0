"""`python -m bench.readme`: writes the README's table of figures from the files in bench/results."""

import json
import re
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- figures -->\n).*?(<!-- /figures -->)", re.S)

ROWS = [
    ("engine_cpu.json", "engine_vs_module_lstm", "{:.2f}", "engine, host to host, against the bare module: 2x256 LSTM"),
    ("engine_cpu.json", "engine_vs_module_silero", "{:.2f}", "the same: Silero VAD"),
    ("engine_cpu.json", "scheduler_us", "{:.2f} µs", "scheduling, for each segment, with 4,096 sessions ready"),
    ("engine_cpu.json", "idle_bytes_ratio", "{:.2f}", "memory of an idle session, against its state's bytes"),
    (
        "compare_cpu.json",
        "vs_naive",
        "{:.1f}x",
        "segments of 1 timestep per second, against plain Ray Serve at its best",
    ),
    ("compare_cpu.json", "vs_naive_plain", "{:.1f}x", "the same, without Ray's private handle options on that side"),
    ("compare_cpu.json", "vs_naive_t10", "{:.1f}x", "against plain Ray Serve at its best, segments of 10 timesteps"),
    (
        "compare_cpu.json",
        "lockstep_share_of_raw_t10",
        "{:.2f}",
        "Lockstep's rate there, as a share of the bare module's on one core",
    ),
    (
        "chaos_cpu.json",
        "lost",
        "{:.0f}",
        "kills of ten kinds, more than twenty of each, 500 sessions on three nodes: timesteps lost",
    ),
    ("chaos_cpu.json", "doubled", "{:.0f}", "the same: timesteps doubled"),
    ("chaos_cpu.json", "wrong", "{:.0f}", "the same: sessions with an output that is not the module's"),
    ("chaos_cpu.json", "hung", "{:.0f}", "the same: outputs that came more than 10 s late"),
    ("chaos_cpu.json", "gap_p50_s", "{:.2f} s", "the same: longest delay of a session that was hit, median"),
    ("chaos_cpu.json", "gap_p99_s", "{:.2f} s", "the same: 99th percentile"),
    ("drain_cpu.json", "replayed", "{:.0f}", "scaled 4, 1, 4 and a node drained, 500 sessions: timesteps run again"),
    (
        "drain_cpu.json",
        "drain_gap_p99_s",
        "{:.2f} s",
        "the same: longest delay of a session that moved, 99th percentile",
    ),
    ("directory_cpu.json", "directory_opens_per_s", "{:,.0f}", "the directory with a million sessions: opens a second"),
    ("directory_cpu.json", "directory_bytes_per_session", "{:.0f}", "the same: bytes of each, without its state"),
    ("directory_cpu.json", "failover_10k_s", "{:.1f} s", "10,000 sessions lose their replica: until all run again"),
    (
        "demo_cpu.json",
        "vad_max_diff",
        "{:.0e}",
        "speech probabilities: largest difference to the package's own model",
    ),
    ("demo_cpu.json", "delay_p50_ms", "{:.1f} ms", "delay of a segment in the demo, median"),
    (
        "bert_cpu.json",
        "ragged_vs_padded",
        "{:.1f}x",
        "BERT, rows as long as sentences: packed against padded",
    ),
    ("triton_cpu.json", "vs_triton_best", "{:.2f}x", "a timestep a gRPC message, 64 sequences: rate against Triton's"),
    ("triton_cpu.json", "vs_triton_best_p99", "{:.2f}", "the same: Triton's 99th percentile of the delay against ours"),
    ("triton_cpu.json", "vs_triton_best_tuned", "{:.2f}x", "that rate, Triton with our allocator settings"),
    ("triton_cpu.json", "vs_triton_ragged_default", "{:.1f}x", "1 to 16 timesteps a message: against Triton's default"),
    ("triton_cpu.json", "vs_triton_ragged_default_tuned", "{:.1f}x", "the same, Triton with our allocator settings"),
    ("triton_cpu.json", "vs_triton_ragged_padded_tuned", "{:.2f}x", "the same, and with padding in the model"),
    ("tune_lstm_cpu.json", "tune_vs_sweep", "{:.2f}", "the tuner's choice against the best of an exhaustive sweep"),
]


def table() -> str:
    """The figures as a Markdown table, with the machine they are from."""
    lines, machines = ["| figure | |", "| --- | --- |"], set()
    for file, name, form, meaning in ROWS:
        report: dict[str, Any] = json.loads((RESULTS / file).read_text())
        lines.append(f"| {meaning} `[{name}]` | {form.format(report['figures'][name])} |")
        hardware = report["hardware"]
        machines.add(
            f"{hardware['cpu']}, {hardware['cores']} cores, no GPU; torch {hardware['torch']}, Ray {hardware['ray']}"
        )
    return "\n".join([*lines, "", f"On {' / '.join(sorted(machines))}.", ""])


def rendered(readme: str) -> str:
    """The README with the table of now."""
    return BLOCK.sub(lambda match: match[1] + table() + match[2], readme)


@click.command()
def main() -> None:
    """Write the README's table of figures from the files in bench/results."""
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))


if __name__ == "__main__":
    main()
