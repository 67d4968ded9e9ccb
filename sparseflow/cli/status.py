"""Show how a weight server is: its models, memory, disk, prefetching and sessions."""

import argparse
import json
import sys
import time
from typing import Any

from sparseflow.cli.arguments import number
from sparseflow.errors import BadRequest, ServerNotRunning
from sparseflow.utils.sizes import format_size

_CLEAR = "\x1b[H\x1b[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--server --watch --count --timeout"""
    parser.add_argument("--server", metavar="NAME", help="which one; else the only one that runs")
    parser.add_argument("--watch", type=number(float, 0.1), metavar="SECONDS", help="again and again, until Ctrl-C")
    parser.add_argument("--count", type=number(int, 1), metavar="N", help="with --watch: so many times")
    parser.add_argument("--timeout", type=number(float, 0.1), default=5.0, metavar="SECONDS", help="for an answer")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print a page, or with --json one object (a line each time with --watch). Not ok where the server is degraded."""
    from sparseflow.protocol.inquiry import ask_status

    name = arguments.server or _only_server()
    content = ask_status(name, arguments.timeout)
    n_shown = 1
    while arguments.watch is not None and n_shown != arguments.count:
        if arguments.json:
            print(json.dumps(content), flush=True)
        else:
            print((_CLEAR if sys.stdout.isatty() else "") + page(content), flush=True)
        time.sleep(arguments.watch)
        content = ask_status(name, arguments.timeout)
        n_shown += 1
    if not arguments.json:
        print((_CLEAR if arguments.watch and sys.stdout.isatty() else "") + page(content))
    return content | {"ok": content["state"] != "degraded"}


def _only_server() -> str:
    from sparseflow.protocol.run_directory import RunDirectory, runtime_dir, server_names

    alive = [name for name in server_names() if RunDirectory.of(name).is_alive()]
    if not alive:
        raise ServerNotRunning(f"no server runs here ({runtime_dir()}); start one: sparseflow-daemon STORE --name NAME")
    if len(alive) > 1:
        raise BadRequest(f"{len(alive)} servers run here; name one with --server: {', '.join(alive)}")
    return alive[0]


def page(content: dict[str, Any]) -> str:
    """A status for people."""
    arena, disk, prefetch, memory = (content[name] for name in ("arena", "disk", "prefetch", "memory"))
    lines = [
        f"server {content['name']}: {content['state']}, pid {content['pid']}, up {_duration(content['uptime_s'])}, "
        f"version {content['version']}, epoch {content['epoch']:x}",
        *(f"  ! {reason}" for reason in content["reasons"]),
        f"  memory     {_size(memory['shared'])} shared, {_size(memory['private'])} private, "
        f"{_size(memory['page_cache'])} of the stores in the page cache",
        f"  arena      {_size(arena['total'])}: {_size(arena['used'])} used, {_size(arena['leased'])} leased, "
        f"{_size(arena['filling'])} filling; hit rate {_share(content['hit_rate'])}, {content['evictions']} evictions",
        f"  disk       {_size(disk['bytes'])} in {disk['reads']} reads of {_number(disk['bundles_per_read'])} bundles; "
        f"a layer's take {_ms(disk['latency_p50_s'])}, at worst {_ms(disk['latency_p99_s'])} (99 %)",
        *(f"    {reason}" for reason in disk["reasons"]),
        f"  prefetch   {prefetch['hinted']} bundles: {prefetch['useful']} useful, {prefetch['late']} late, "
        f"{prefetch['wasted']} wasted",
    ]
    for model in content["models"]:
        where = "all in memory" if model["is_resident"] else f"{model['n_resident']} of {model['n_slots']} slots used"
        lines.append(
            f"  model      {model['name']}: {model['state']}, {model['dtype']}, {where}, "
            f"fingerprint {model['fingerprint']['weights'][:12]}"
        )
        rates = [rate for rate in model["hit_rate_by_layer"] or [] if rate is not None]
        if rates and not model["is_resident"]:
            lines.append(f"    hits by layer  {' '.join(f'{rate:.0%}' for rate in rates)}")
    lines.append(f"  sessions   {len(content['sessions'])} of {content['max_sessions']}")
    if content["sessions"]:
        lines.append("      PID  MODEL             TOKENS  TOKENS/S  HITS          RECALL  LEASES  LAST ERROR")
    for session in content["sessions"]:
        lines.append(
            f"  {session['pid']:7}  {session['model'][:16]:16} {session['tokens']:7}  {session['tokens_per_s']:8.1f}  "
            f"{_share(session['hit_rate']):>4}  {_recall(session):>14}  {session['leases']:6}  "
            f"{session['last_error'] or ('' if session['state'] == 'open' else session['state'])}"
        )
    ill = [thread["name"] for thread in content["threads"] if not thread["alive"]]
    lines.append(f"  threads    {len(content['threads'])}, {'dead: ' + ', '.join(ill) if ill else 'all well'}")
    return "\n".join(lines)


def _size(nbytes: int | None) -> str:
    return "n/a" if nbytes is None else format_size(nbytes)


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0%}"


def _recall(session: dict[str, Any]) -> str:
    """In per cent, with one standard error."""
    recall, error = session["recall"], session["recall_error"]
    return "n/a" if recall is None else f"{recall:.2%} ±{100 * error:.2f}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


def _ms(value_s: float | None) -> str:
    return "n/a" if value_s is None else f"{1000 * value_s:.1f} ms"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
