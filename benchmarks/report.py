"""The results of `benchmarks.gpu` as Markdown tables."""

from typing import Any

TITLES = {
    "machine": "Machine",
    "tests": "Tests marked `gpu`",
    "training": "Training step",
    "sampling": "Sampling",
    "throughput": "Reading and other networks",
    "quickstart": "Quickstart",
    "memory": "Largest batch",
}
NOTES = {
    "machine": "Matrix products of random data, 8192 x 8192 x 8192 on a GPU; a copy counts bytes read and written.",
    "training": "The loop of `train.py` on random latents of 256 px that are on the device, with one average of the "
    "weights. Times are medians over the timed steps, in parentheses the 10th and 90th percentile. MFU counts a "
    "backward as two forwards and a recomputed forward as none; it is relative to the data sheet's dense rate, and "
    "to the matrix product measured beside it. Start-up is the first two steps, compilation included.",
    "sampling": "SDE through `generation/images.py`, without decoding. Images/s are extrapolated to 250 steps from two "
    "short runs, not run; shares count two operations per multiply-add.",
    "throughput": "Random weights, the real architectures.",
    "memory": "Powers of two, two eager steps each with one average of the weights; the estimate is the dry run's.",
}
COLUMNS = {
    "machine": ("tflops", "gb_per_second", "time"),
    "training": ("images_per_second", "time", "mfu_data_sheet", "mfu_measured", "peak_gib", "start_up_s"),
    "sampling": ("images_per_second_250", "time", "share_data_sheet", "share_measured", "peak_gib", "start_up_s"),
    "throughput": ("images_per_second", "batch_size", "time"),
    "memory": ("batch_size", "twice_as_many", "peak_gib", "estimate_gib"),
    "tests": ("passed", "failed", "skipped", "seconds"),
    "quickstart": ("seconds",),
}
HEADINGS = {
    "tflops": "TFLOP/s",
    "gb_per_second": "GB/s",
    "time": "ms",
    "images_per_second": "images/s",
    "images_per_second_250": "images/s at 250 steps",
    "mfu_data_sheet": "MFU, data sheet",
    "mfu_measured": "MFU, measured rate",
    "share_data_sheet": "of the data sheet",
    "share_measured": "of the measured rate",
    "peak_gib": "peak GiB",
    "estimate_gib": "estimated GiB",
    "start_up_s": "start-up s",
    "batch_size": "batch",
    "twice_as_many": "twice as many",
}


def markdown(results: dict[str, Any], order: list[str]) -> str:
    """All parts, each with its table and a note if it is incomplete."""
    commit = results["commit"] or "unknown (not in a checkout)"
    lines = [
        f"# {results['device']}, {results['date']}",
        "",
        f"`{results['command']}`, commit {commit}, sources {results['sources']}; torch {results['torch']}, Python "
        f"{results['python']}, {results['cpus']} CPU cores.",
    ]
    for name in order:
        record = results["parts"].get(name)
        lines += ["", f"## {TITLES[name]}", NOTES.get(name, "")]
        if record is None:
            lines.append("Not run.")
            continue
        if record.get("note"):
            lines.append(f"**{record['note']}**")
        lines += table(record["rows"], COLUMNS[name])
        for row in record["rows"]:
            lines += details(row)
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    """One line per row; a row that failed has its error in the first cell."""
    rows = [row for row in rows if "kernels" not in row and row["name"] != "driver"]
    columns = tuple(c for c in columns if any(cell(row, c) for row in rows))
    if not rows:
        return []
    lines = ["", "| | " + " | ".join(HEADINGS.get(c, c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        problem = row.get("error") or (row.get("skipped") if isinstance(row.get("skipped"), str) else None)
        cells = [cell(row, column) for column in columns]
        name = f"{row['name']}: {problem}" if problem else row["name"]
        lines.append("| " + " | ".join([name.replace("|", "/"), *cells]) + " |")
    return lines


def cell(row: dict[str, Any], column: str) -> str:
    """One figure for display."""
    if column == "time":
        return f"{row['ms']:.3g} ({row['ms_p10']:.3g}-{row['ms_p90']:.3g})" if "ms" in row else ""
    value = row.get(column)
    if value is None or (isinstance(value, str) and column != "twice_as_many"):
        return ""
    if column.startswith(("mfu", "share")):
        return f"{100 * value:.1f} %"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def details(row: dict[str, Any]) -> list[str]:
    """What does not fit into a table: the driver, names of tests, kernels."""
    lines = []
    if row["name"] == "driver" and "error" not in row:
        lines.append("\n" + ", ".join(f"{key} {value}" for key, value in row.items() if key != "name"))
    for kind in ("failed", "skipped"):
        lines += [f"- {kind}: {name}" for name in row.get(f"names_{kind}", [])]
    if "kernels" in row:
        idle = f"; no kernel runs in {100 * row['idle_share']:.1f} % of the time" if "idle_share" in row else ""
        waits = ", ".join(f"{name} {count:g}" for name, count in row["host_waits_per_step"].items()) or "none"
        lines += [
            "",
            f"### {row['name'][0].upper()}{row['name'][1:]}",
            f"The host's waits per call: {waits}{idle}.",
            "",
        ]
        lines += ["| kernel | us per call | share | launches |", "|---|---|---|---|"]
        for k in row["kernels"]:
            name = k["kernel"].replace("|", "/")
            lines.append(f"| `{name}` | {k['us']:.0f} | {100 * k['share']:.1f} % | {k['calls']:g} |")
    return lines
