"""The tables and figures of speed of README.md and RESULTS.md, from what `reproduce.sh` and `gpu.py` have written.

python scripts/bench/tables.py            # print them
python scripts/bench/tables.py --write    # put them into the pages, each between its two marks; and draw the figures
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseflow.bench.figure import draw, draw_gpu, name_of
from sparseflow.bench.gpu.cases import SMALL_CAP
from sparseflow.bench.gpu.report import markdown
from sparseflow.bench.report import rate_cells
from sparseflow.utils.sizes import format_size

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")
PAGES = (ROOT / "README.md", Path(__file__).with_name("RESULTS.md"))
END = "<!-- end -->"
Row = dict[str, Any]


def number(key: str, unit: float = 1, digits: int = 0, suffix: str = "") -> Callable[[Row], str]:
    """A column's cell: a figure of the row, or a dash."""
    return lambda row: "-" if row.get(key) is None else f"{row[key] / unit:.{digits}f}{suffix}"


def computed(row: Row) -> str:
    """Neurons active and computed."""
    if row.get("candidate_share") is None:
        return "all"
    return f"{row['active_share']:.1%} / {row['candidate_share']:.1%}"


COMMON = [
    ("neurons active / computed", computed),
    ("read per token", number("bytes_touched_per_token", 1e6, 0, " MB")),
    ("limit of memory, tokens/s", number("memory_limit_tokens_per_s", 1, 1)),
]
PROMPT = ("prompt, s", number("time_to_first_token_s", 1, 2))
LOAD = ("load, s", number("load_s", 1, 0))
PRIVATE = ("private memory", number("anonymous_nbytes", 1 << 20, 0, " MiB"))
SAME = ("same likeliest token", number("same_as_dense", 0.01, 0, " %"))
DISK = [
    ("from disk per token", number("bytes_from_disk_per_token", 1e6, 0, " MB")),
    ("limit of the disk, tokens/s", number("disk_limit_tokens_per_s", 1, 1)),
]
COLUMNS = {
    "opt-1.3b-limited": [*COMMON[:1], *DISK, PROMPT, LOAD, PRIVATE, SAME],
    "opt-6.7b": [*COMMON, *DISK, PROMPT, LOAD, PRIVATE],
}
OTHERWISE = [*COMMON, PROMPT, LOAD, PRIVATE, SAME]


def table(title: str, result: dict[str, Any]) -> str:
    """A result as Markdown, and under what conditions."""
    summary, asked, environment = result["summary"], result["conditions"], result["environment"]
    columns = COLUMNS.get(title, OTHERWISE)
    first = next(iter(summary))
    heads = ["", f"tokens/s, median of {summary[first]['n_runs']} (range)", f"times {name_of(first)}"]
    lines = [heads + [head for head, _ in columns]]
    lines.append(["---"] * len(lines[0]))
    for label, row in summary.items():
        lines.append([name_of(label), *rate_cells(row, first), *(cell(row) for _, cell in columns)])
    memory = result["machine"]["memory_bytes_per_s"]
    limit = f"{format_size(asked['limit_nbytes'])} of memory with page cache, cold" if asked["limit_nbytes"] else "warm"
    conditions = (
        f"{asked['tokens']} tokens after a prompt of {asked['prompt_tokens']}; {limit}; {asked['threads']} threads of "
        f"{environment['cpu']} ({', '.join(environment['vectors'])}), memory read at {min(memory) / 1e9:.0f}-"
        f"{max(memory) / 1e9:.0f} GB/s{_disk(result['machine'])}."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + conditions


def _disk(machine: dict[str, Any]) -> str:
    rates = machine["random_bytes_per_s"]
    if not rates:
        return ""
    return (
        f", the disk at {min(rates) / 1e6:.0f}-{max(rates) / 1e6:.0f} MB/s in pieces of "
        f"{machine['random_block_nbytes']} bytes"
    )


def written_into(text: str, tables: dict[str, str]) -> str:
    """`text` with each table between its marks."""
    for title, content in tables.items():
        begin = f"<!-- bench {title} -->"
        before, mark, after = text.partition(begin)
        if mark:
            _, end, rest = after.partition(END)
            text = f"{before}{begin}\n{content}\n{end}{rest}"
    return text


def all_tables() -> dict[str, str]:
    """By the name of the result; those of GPUs (`gpu-*.json`) are one, machine after machine."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    of_gpus = [markdown(results.pop(title)) for title in list(results) if title.startswith("gpu-")]
    tables = {title: table(title, result) for title, result in results.items()}
    return tables | ({"gpu": "\n\n".join(of_gpus)} if of_gpus else {})


def write_figures() -> None:
    """`NAME.svg` beside every `NAME.json`."""
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        is_of_gpu = path.stem.startswith("gpu-")
        figure = draw_gpu(result, "opt-6.7b", SMALL_CAP) if is_of_gpu else draw(result)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Print, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md and RESULTS.md")
    if parser.parse_args().write:
        for page in PAGES:
            page.write_text(written_into(page.read_text(encoding="utf-8"), all_tables()), encoding="utf-8")
        write_figures()
        return
    for title, content in all_tables().items():
        sys.stdout.write(f"{title}\n\n{content}\n\n")


if __name__ == "__main__":
    main()
