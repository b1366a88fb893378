"""Results of benchmarks on the screen and as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vitrail.tools._common.table import Bar, Column, Row, print_table, write_bars

# Of a step of a model or a part of one, with times in milliseconds.
STEP_COLUMNS = (
    *(Column(f"p{p} ms", f"latency_p{p}_ms", lambda x: f"{x:,.2f}") for p in (20, 50, 80)),
    Column("memory MB", "peak_memory_bytes", lambda n: f"{n / 1e6:,.0f}"),
    Column("speed", "speed_ratio", lambda x: f"{x:.2f}x"),
)
MODEL_COLUMNS = (
    Column("model", "label", left=True),
    Column("size", "size"),
    Column("params M", "parameters", lambda n: f"{n / 1e6:.2f}"),
    Column("GMACs", "flops", lambda n: f"{n / 2e9:.2f}"),
    Column("images/s", "images_per_s", lambda x: f"{x:,.1f}"),
    *STEP_COLUMNS,
)
_KERNEL_COLUMNS = (
    Column("implementation", "label", left=True),
    Column("error", "relative_error", lambda x: f"{x:.1e}"),
    *(Column(f"p{p} ms", f"p{p}_ms", lambda x: f"{x:.4f}") for p in (20, 50, 80)),
    Column("bandwidth", "bandwidth_share", lambda x: f"{x:.0%}"),
    Column("memory MB", "peak_memory_bytes", lambda n: f"{n / 1e6:,.0f}"),
    Column("ours is", "ours_speedup", lambda x: f"{x:.2f}x"),
)
_HOST_COLUMNS = (
    Column("implementation", "label", left=True),
    *(Column(f"p{p} us", f"p{p}_ms", lambda x: f"{x * 1e3:.1f}") for p in (20, 50, 80)),
    Column("ours is", "ours_speedup", lambda x: f"{x:.2f}x"),
)


BESIDE = "beside others that compiled"


def headline(row: Row) -> str:
    """Device, versions and commit of a row."""
    software = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "timm") if row[name])
    threads = f" ({row['threads']} threads)" if row["threads"] else ""
    return f"{row['device']}{threads}; {software}; commit {row['commit'] or 'unknown'}"


def kernel_headline(row: Row) -> str:
    """The same with the dtype and the speed of a copy and of matrix products."""
    speed = f"copy {row['copy_bytes_per_s'] / 1e9:,.0f} GB/s, products {row['matmul_flops_per_s'] / 1e12:,.0f} TFLOP/s"
    return f"{headline(row)}; {row['dtype']}, {speed}"


def show_kernels(console: Console, rows: Sequence[Row]) -> None:
    """Prints the tables of a case, one for each pass."""
    for title, members in _by_pass(rows).items():
        first = members[0]
        columns = _HOST_COLUMNS if first["host_time"] else _KERNEL_COLUMNS
        what = "time on the host" if first["host_time"] else f"floor {first['floor_ms']:.4f} ms"
        print_table(console, f"{title}, {what}", columns, [{**row, "label": kernel_label(row)} for row in members])


def _by_pass(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['operator']} {row['case']} {row['pass']}", []).append(row)
    return groups


def kernel_label(row: Row) -> str:
    """Name of an implementation, marked * where it does a part of the job, and what there is to remark."""
    waits = row["peak_memory_bytes"] is not None and not row["cuda_graph"] and not row["host_time"]
    note = row["note"] or ("no CUDA graph: it waits for the GPU" if waits else None)
    if not row.get("alone", True):
        note = f"{note}; {BESIDE}" if note else BESIDE
    return row["implementation"] + "*" * (not row["whole_job"]) + (f" ({note})" if note else "")


def draw_kernels(path: Path, rows: Sequence[Row]) -> None:
    """Draws times in multiples of the least possible, the roofline, which is dashed."""
    axis = "time in multiples of the least, of traffic or of products (line: 20th to 80th percentile)"
    bars = [_kernel_bar(title, row) for title, members in _by_pass(rows).items() for row in members if row["p50_ms"]]
    write_bars(path, kernel_headline(rows[0]), axis, bars, limit=1.0)


def roof_ms(row: Row) -> float:
    """Least time in milliseconds: of its traffic, or of its products where these take longer."""
    return max(row["floor_ms"], products_ms(row))


def products_ms(row: Row) -> float:
    """Milliseconds in which a large matrix product does as many operations; 0 where they were not counted."""
    return 1e3 * (row.get("flops") or 0) / row.get("matmul_flops_per_s", math.inf)


def _kernel_bar(title: str, row: Row) -> Bar:
    roof = roof_ms(row)
    middle, low, high = (row[key] / roof for key in ("p50_ms", "p20_ms", "p80_ms"))
    bound = "traffic" if roof == row["floor_ms"] else "products"
    speed = (row["flops"] or 0) / row["p50_ms"] / 1e9
    note = f"{row['p50_ms']:.3f} ms, {1 / middle:.0%} of the roof ({bound}), {speed:.1f} TFLOP/s"
    return Bar(title, kernel_label(row), middle, low, high, note)


def model_label(row: Row) -> str:
    """Name of a model and how it ran."""
    beside = [BESIDE] * (not row.get("alone", True))
    how = ", ".join([*["compiled"] * (row["variant"] == "compiled"), *["CUDA graph"] * row["cuda_graph"], *beside])
    return f"{row['model']} ({how})" if how else row["model"]


def model_work(row: Row) -> str:
    """What all models of a table did."""
    work = f"{row['mode']}, batch {row['batch_size']}, {row['precision']}"
    return work + ", channels last" * row["channels_last"]


def show_models(console: Console, rows: Sequence[Row]) -> None:
    """Prints a table for each kind of work."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(model_work(row), []).append(row)
    for work, members in groups.items():
        shown = [
            {
                **row,
                "label": model_label(row) + (f": {row['note']}" if row["note"] else ""),
                "size": f"{row['height']}x{row['width']}",
            }
            for row in members
        ]
        print_table(console, f"{work}; speed against {members[0]['reference']}", MODEL_COLUMNS, shown)


def draw_models(path: Path, rows: Sequence[Row]) -> None:
    """Draws the throughput of models."""
    axis = "images per second (line: 20th to 80th percentile)"
    write_bars(path, headline(rows[0]), axis, [_model_bar(row) for row in rows if row["images_per_s"]])


def _model_bar(row: Row) -> Bar:
    low, high = (row["batch_size"] / row[key] * 1e3 for key in ("latency_p80_ms", "latency_p20_ms"))
    speed = row["images_per_s"]
    note = f"{speed:,.0f}/s, {row['speed_ratio'] or math.nan:.2f}x, {row['flops'] / 2e9:.1f} GMACs"
    return Bar(model_work(row), model_label(row), speed, low, high, note)
