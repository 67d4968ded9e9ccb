"""What the GPU benchmark found: a row a case, beside the limits of the machine and the others' rates; as Markdown.

A limit is what would be if nothing but moving the case's own bytes took time: those read from the GPU's memory and
those that come over PCIe (page-locked), at once (`overlapped`) or one after the other (`in_turn`).
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparseflow.bench.gpu.cases import CPU_OFFLOAD, DEVICE_MAP, GB, SMALL_CAP, SMALLER, SPARSEFLOW, TRANSFORMERS

Row = dict[str, Any]
NOT_BEGUN = "not begun"

TARGETS = (  # what, of which figure, at least
    ("tokens/s", 100.0),
    (f"times accelerate {DEVICE_MAP}", 15.0),
    ("times own dense offload", 7.0),
    ("times one process, by two at one server", 1.0),
)


def limits(device_nbytes: float, pcie_nbytes: float, machine: Mapping[str, Any]) -> dict[str, float]:
    """Tokens per second that the bytes of a token allow, and what share of a second each kind takes for one."""
    device_s = device_nbytes / machine["memory_bytes_per_s"]
    pcie_s = pcie_nbytes / machine["pinned_bytes_per_s"]
    return {
        "device_s_per_token": device_s,
        "pcie_s_per_token": pcie_s,
        "overlapped_tokens_per_s": 1 / max(device_s, pcie_s),
        "in_turn_tokens_per_s": 1 / (device_s + pcie_s),
    }


def agreement(found: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> Row:
    """Where ids first differ, generation by generation, as far as both go. None: nowhere."""
    first = [
        next((n for n, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), None)
        for a, b in zip(found, reference, strict=False)
    ]
    n_compared = sum(min(len(a), len(b)) for a, b in zip(found, reference, strict=False))
    return {
        "is_equal": n_compared > 0 and not any(n is not None for n in first),
        "first_differences": first,
        "n_same": sum(
            one == other for a, b in zip(found, reference, strict=False) for one, other in zip(a, b, strict=False)
        ),
        "n_compared": n_compared,
    }


def rows_of(runs: Sequence[Row], machine: Mapping[str, Any] | None) -> list[Row]:
    """A row for each run; what failed has its status and whatever it told before."""
    rows = [_row(run, machine) for run in runs]
    for row, run in zip(rows, runs, strict=True):
        if row["status"] == "ok":
            others = {name: other for name, other in _references(run, runs).items() if other is not run}
            row["agreement"] = {name: agreement(_ids(run), _ids(other)) for name, other in others.items()}
            row["greedy_agreement"] = {name: agreement(_greedy(run), _greedy(other)) for name, other in others.items()}
            row["times"] = _times(row, rows)
    return rows


def _row(run: Row, machine: Mapping[str, Any] | None) -> Row:
    about = ("label", "program", "model", "fidelity", "cap_nbytes", "n_served", "hints", "status", "wall_s")
    row: Row = {name: run.get(name) for name in (*about, "device_peak_nbytes")}
    processes = run.get("processes", [])
    made = [one for process in processes for one in process.get("generations", [])]
    rates = [one["decode_tokens_per_s"] for one in made if one["decode_tokens_per_s"]]
    if not rates:
        return row
    row |= {
        "n_generations": len(made),
        "n_tokens": len(made[0]["ids"]),
        "decode_tokens_per_s": statistics.median(rates),
        "lowest_tokens_per_s": min(rates),
        "highest_tokens_per_s": max(rates),
        "time_to_first_token_s": statistics.median(one["time_to_first_token_s"] for one in made),
        "together_tokens_per_s": _together(made),
    }
    for name in (
        "load_s", "active_share", "candidate_share", "hit_rate", "device_bytes_per_token", "pcie_bytes_per_token",
        "allocated_peak_nbytes", "reserved_peak_nbytes",
    ):  # fmt: skip
        values = [process[name] for process in processes if process.get(name) is not None]
        row[name] = statistics.median(values) if values else None
    row["hit_rates"] = processes[0].get("hit_rates")
    row["transport"] = (processes[0].get("device") or {}).get("transport")
    row["uses_graph"] = (processes[0].get("device") or {}).get("uses_graph")
    if run.get("cap_nbytes") and run.get("device_peak_nbytes") is not None and run["program"] == SPARSEFLOW:
        row["is_within_cap"] = run["device_peak_nbytes"] <= run["cap_nbytes"] * max(1, run["n_served"])
    if machine and row["device_bytes_per_token"] is not None and row["pcie_bytes_per_token"] is not None:
        row |= _against_limits(row, run, machine)
    return row


def _together(made: Sequence[Row]) -> float:
    """Tokens of all processes over the time from the first's start to the last's end, prompts included."""
    n_tokens = sum(len(one["ids"]) for one in made)
    return n_tokens / (max(one["end"] for one in made) - min(one["start"] for one in made))


def _against_limits(row: Row, run: Row, machine: Mapping[str, Any]) -> Row:
    """The limits, and which of the two would be reached first by what all processes decode together."""
    found = limits(row["device_bytes_per_token"], row["pcie_bytes_per_token"], machine)
    n_per_s = row["decode_tokens_per_s"] * max(1, run["n_served"])
    shares = {"GPU memory": n_per_s * found["device_s_per_token"], "PCIe": n_per_s * found["pcie_s_per_token"]}
    return {
        "limits": found,
        "share_of_overlapped_limit": n_per_s / found["overlapped_tokens_per_s"],
        "shares": shares | {"GPU busy": run.get("busy_share")},
        "nearest_limit": max(shares, key=lambda name: shares[name]),
    }


def _ids(run: Row) -> list[list[int]]:
    return [one["ids"] for one in run["processes"][0].get("generations", [])]


def _greedy(run: Row) -> list[list[int]]:
    return [one["ids"] for one in [run["processes"][0].get("greedy")] if one]


def _references(run: Row, runs: Sequence[Row]) -> dict[str, Row]:
    """What ids are compared with: transformers' dense model, and our own, both of the same model."""
    same = [other for other in runs if other["model"] == run["model"] and other["status"] == "ok"]
    dense = [other for other in same if other["program"] == SPARSEFLOW and other["fidelity"] == "dense"]
    dense.sort(key=lambda other: other["cap_nbytes"] is not None)  # all on the GPU first
    found = {"transformers": [other for other in same if other["program"] == TRANSFORMERS], "own dense": dense}
    return {name: others[0] for name, others in found.items() if others}


def _times(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """How many times as fast as what it can be compared with: the same model with the same cap, or all on the GPU."""
    found = {}
    for other in rows:
        if other is row or other["model"] != row["model"] or other.get("decode_tokens_per_s") is None:
            continue
        if row["n_served"] and other["n_served"]:
            found[other["label"]] = row["together_tokens_per_s"] / other["together_tokens_per_s"]
        elif not other["n_served"] and other["cap_nbytes"] in (None, row["cap_nbytes"]):
            found[other["label"]] = row["decode_tokens_per_s"] / other["decode_tokens_per_s"]
    return found


def times(row: Row, program: str, fidelity: str, cap_nbytes: int | None) -> float | None:
    """A row's ratio to another case."""
    words = [row["model"], f"{program}:{fidelity}" if fidelity else program]
    if cap_nbytes is not None:
        words.append(f"{cap_nbytes / GB:g}GB")
    return (row.get("times") or {}).get(" ".join(words))


def targets(rows: Sequence[Row]) -> list[Row]:
    """What shall be reached at the small cap, and what the best of the sparse cases reaches."""
    sparse = [
        row
        for row in rows
        if row["program"] == SPARSEFLOW and row["fidelity"] != "dense" and row["status"] == "ok"
        and (row["model"], row["cap_nbytes"]) == (SMALLER, SMALL_CAP)
    ]  # fmt: skip
    alone = [row for row in sparse if not row["n_served"]]
    pairs = [
        row["times"].get(row["label"].replace("served to 2", "served to 1")) for row in sparse if row["n_served"] == 2
    ]
    found = (
        [row["decode_tokens_per_s"] for row in alone],
        [times(row, DEVICE_MAP, "", SMALL_CAP) for row in alone],
        [times(row, SPARSEFLOW, "dense", SMALL_CAP) for row in alone],
        pairs,
    )
    result = []
    for (what, least), values in zip(TARGETS, found, strict=True):
        known = [value for value in values if value is not None]
        best = max(known) if known else None
        result.append({"what": what, "target": least, "found": best, "is_met": None if best is None else best >= least})
    return result


# --- for people


def name_of(row: Row) -> str:
    """Of a case, for a table."""
    where = {
        TRANSFORMERS: "transformers dense, all on the GPU",
        CPU_OFFLOAD: "accelerate `cpu_offload`",
        DEVICE_MAP: 'accelerate `device_map="auto"`',
    }.get(row["program"])
    if where is None and row["fidelity"] == "dense":
        where = "SparseFlow `dense`" + (", all on the GPU" if row["cap_nbytes"] is None else ": our own offload")
    where = where or f"**SparseFlow `{row['fidelity']}`**" + (", hints" if row.get("hints") else "")
    if row["n_served"]:
        where += f", {row['n_served']} process{'es' * (row['n_served'] > 1)} at one server"
    return f"{row['model']} {where}"


def markdown(result: Mapping[str, Any]) -> str:
    """The table of one machine, and under what conditions."""
    rows = result["rows"]
    heads = (
        "", "GPU memory allowed", "tokens/s, median (range)", "times accelerate", "times own offload",
        "first token, ms", "load, s", "GPU memory taken", "neurons found in a slot", "over PCIe per token",
        "limit, tokens/s", "likeliest ids as transformers / own dense",
    )  # fmt: skip
    begun = [row for row in rows if not row["status"].startswith(NOT_BEGUN)]
    lines = [list(heads), ["---"] * len(heads), *(_cells(row) for row in begun)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([table, *filter(None, [_of_two(rows), _not_begun(rows)]), _conditions(result)])


def _not_begun(rows: Sequence[Row]) -> str:
    """What time did not suffice for."""
    labels = [f"`{row['label']}`" for row in rows if row["status"].startswith(NOT_BEGUN)]
    return f"Not measured, for want of time: {', '.join(labels)}." if labels else ""


def _cells(row: Row) -> list[str]:
    cap, allowed = row["cap_nbytes"], "all"
    if cap is not None:
        allowed = f"{cap / GB:g} GB" + (" each" if row["n_served"] > 1 else "")
    if row["program"] == CPU_OFFLOAD:
        allowed = "little"
    if row.get("decode_tokens_per_s") is None:
        return [name_of(row), allowed, row["status"], *["-"] * 9]
    found = row.get("limits")
    limit = f"{found['overlapped_tokens_per_s']:.0f}, {found['in_turn_tokens_per_s']:.0f}" if found else "-"
    rate = "{decode_tokens_per_s:.1f} ({lowest_tokens_per_s:.1f}-{highest_tokens_per_s:.1f})".format(**row)
    return [
        name_of(row),
        allowed,
        rate + ("" if row["status"] == "ok" else f"; {row['status']}"),
        _number(times(row, DEVICE_MAP, "", cap), 1),
        _number(times(row, SPARSEFLOW, "dense", cap) if cap is not None else None, 1),
        _number(row["time_to_first_token_s"], 0, 1e-3),
        _number(row["load_s"], 0),
        _number(row["device_peak_nbytes"], 1, GB, " GB"),
        _number(row["hit_rate"], 1, 0.01, " %"),
        _number(row["pcie_bytes_per_token"], 0, 1e6, " MB"),
        limit,
        f"{_same(row, 'transformers')} / {_same(row, 'own dense')}",
    ]


def _number(value: float | None, digits: int, unit: float = 1, suffix: str = "") -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}{suffix}"


def _same(row: Row, name: str) -> str:
    found = row.get("agreement", {}).get(name)
    if not found or not found["n_compared"]:
        return "-"
    return "all" if found["is_equal"] else f"{found['n_same']} of {found['n_compared']}"


def _of_two(rows: Sequence[Row]) -> str:
    """What two processes at one server do together, if that was measured."""
    served = {row["n_served"]: row for row in rows if row["n_served"] and row["status"] == "ok"}
    if not {1, 2} <= served.keys():
        return ""
    one, two = served[1], served[2]
    shares = two.get("shares") or {}
    together, alone = two["together_tokens_per_s"], one["together_tokens_per_s"]
    text = (
        f"Two processes at one server decode {together:.1f} tokens/s together, prompts included, one alone "
        f"{alone:.1f}: {together / alone:.2f} times."
    )
    if "nearest_limit" in two:
        text += (
            f" They need {shares['PCIe']:.0%} of PCIe and {shares['GPU memory']:.0%} of the GPU's memory bandwidth; "
            f"{two['nearest_limit']} is the nearer limit."
        )
    return text


def _conditions(result: Mapping[str, Any]) -> str:
    asked, machine = result["conditions"], result.get("machine")
    text = (
        f"{asked['new_tokens']} {'chosen' if asked['text'] == 'greedy' else 'random'} tokens (fewer where a case would "
        f"take too long) after a random prompt of {asked['prompt_tokens']}, float16, random weights of the published "
        "shapes. Limits: GPU memory and PCIe at once, and one after the other."
    )
    if not machine:
        return text
    device, versions = machine["device"], machine["versions"]
    return (
        f"{device['name']}, driver {result['driver'] or 'unknown'}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, accelerate {versions['accelerate']}; its memory copies "
        f"{device['memory_bytes_per_s'] / 1e12:.2f} TB/s (reads and writes), PCIe "
        f"{device['pinned_bytes_per_s'] / GB:.1f} GB/s page-locked and "
        f"{device['pageable_bytes_per_s'] / GB:.1f} GB/s pageable. {text}"
    )
