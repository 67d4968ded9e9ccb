"""Show how a weight server is: its models, memory, disk, prefetching and sessions."""

import argparse
import json
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sparseflow.errors import BadRequest, NoAnswer, ServerNotRunning, SparseFlowError
from sparseflow.utils.parsing import number
from sparseflow.utils.sizes import format_size

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # a screen of our own, without a cursor
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"
_INDENT = " " * 13


class Look(NamedTuple):
    """What was seen of a server."""

    content: dict[str, Any] | None
    """Its status; None where nobody answers."""
    is_last: bool
    waiting: str = ""
    """What to say where nobody answers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--server --watch --count --timeout --prometheus"""
    parser.add_argument("--server", metavar="NAME", help="which one; else the only one that runs")
    parser.add_argument(
        "--watch",
        type=number(float, 0.1),
        metavar="SECONDS",
        help="again and again until Ctrl-C, also while the server is restarted",
    )
    parser.add_argument("--count", type=number(int, 1), metavar="N", help="with --watch: so many times")
    parser.add_argument("--timeout", type=number(float, 0.1), default=5.0, metavar="SECONDS", help="for an answer")
    parser.add_argument(
        "--prometheus",
        action="store_true",
        help="print Prometheus metrics once, as for node_exporter's textfile collector",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print a page, or with --json one object (a line each time with --watch). Not ok where the server is degraded."""
    if arguments.prometheus and (arguments.json or arguments.watch is not None):
        raise BadRequest("--prometheus prints metrics, once: leave --json and --watch out")
    name = arguments.server or _only_server()
    if arguments.prometheus:
        return _print_metrics(name, arguments.timeout)
    if arguments.watch is None:
        content = _print(_looks(name, arguments, threading.Event()), arguments.json)
        return content | {"ok": content["state"] != "degraded"}
    with _interrupted() as stopped:
        looks = _looks(name, arguments, stopped)
        is_on_screen = not arguments.json and sys.stdout.isatty()
        content = _watch_on_screen(looks) if is_on_screen else _print(looks, arguments.json)
    if stopped.is_set():
        arguments.prints_json_itself = True  # it has
        return {"ok": True}
    return content | {"ok": content["state"] != "degraded"}


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Set by Ctrl-C, which may come where an exception would be lost; a second one is an exception."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _looks(name: str, arguments: argparse.Namespace, stopped: threading.Event) -> Iterator[Look]:
    """Each status that is asked for, until `stopped`. A watch that has begun goes on while nobody answers.

    Raises:
        ServerNotRunning, NoAnswer: at the first look, or at the last.
    """
    from sparseflow.protocol.inquiry import ask_status

    n, is_last = 0, False
    while not is_last:
        if n and stopped.wait(arguments.watch):
            return
        n += 1
        is_last = arguments.watch is None or n == arguments.count
        try:
            look = Look(ask_status(name, arguments.timeout), is_last)
        except (ServerNotRunning, NoAnswer) as error:
            if n == 1 or is_last:
                raise
            what = "no answer" if isinstance(error, NoAnswer) else "no server"
            look = Look(None, is_last, f"server {name}: {what}; waiting")
        yield look


def _print(looks: Iterator[Look], is_json: bool) -> dict[str, Any]:
    """One page, or object, under the other; the last object is printed by whoever runs commands. Returns the last."""
    before: dict[str, Any] | None = None
    text = ""
    for content, is_last, waiting in looks:
        if content is None:
            if text != waiting:  # once, however long it takes
                print(waiting, file=sys.stderr if is_json else sys.stdout, flush=True)
            text = waiting
            continue
        text = "" if is_json else page(content, before)
        if not is_json:
            print(_fitted(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text, flush=True)
        elif not is_last:
            print(json.dumps(content), flush=True)
        before = content
    assert before is not None  # there is at least one look
    return before


def _watch_on_screen(looks: Iterator[Look]) -> dict[str, Any]:
    """Pages in one place, none of which is erased before the next is written. Returns the last, which stays."""
    before: dict[str, Any] | None = None
    text = ""
    sys.stdout.write(_ENTER)
    try:
        for content, _, waiting in looks:
            text = waiting if content is None else page(content, before, is_watching=True)
            before = content or before
            sys.stdout.write(_frame(text, *shutil.get_terminal_size()))
            sys.stdout.flush()
    finally:
        sys.stdout.write(_LEAVE)
        print(_fitted(text, shutil.get_terminal_size().columns))
    assert before is not None  # there is at least one look
    return before


def _frame(text: str, columns: int, rows: int) -> str:
    """What puts a page over the one before it, in one piece, so that nothing flickers."""
    lines = _fitted(text, columns).splitlines()
    if len(lines) > rows:
        lines[rows - 1 :] = [f"  ... {len(lines) - rows + 1} more lines; make the window higher"[:columns]]
    return _HOME + "\n".join(line + _REST_OF_LINE for line in lines) + _REST


def _fitted(text: str, columns: int) -> str:
    """Its lines, none longer than so many columns."""
    wrapper = textwrap.TextWrapper(columns, subsequent_indent=_INDENT if columns > 2 * len(_INDENT) else "")
    return "\n".join(piece for line in text.splitlines() for piece in wrapper.wrap(line))


def _print_metrics(name: str, timeout_s: float) -> dict[str, Any]:
    """Ok whatever state the server is in: that is in the metrics.

    Raises:
        ServerNotRunning, NoAnswer: after the one metric that says so is printed.
    """
    from sparseflow.protocol.inquiry import ask_status
    from sparseflow.protocol.metrics import status_text

    try:
        content = ask_status(name, timeout_s)
    except SparseFlowError:
        sys.stdout.write(status_text(name, None))
        raise
    sys.stdout.write(status_text(name, content))
    return {"ok": True}


def _only_server() -> str:
    from sparseflow.protocol.run_directory import RunDirectory, runtime_dir, server_names

    alive = [name for name in server_names() if RunDirectory.of(name).is_alive()]
    if not alive:
        raise ServerNotRunning(f"no server runs here ({runtime_dir()}); start one: sparseflow-daemon STORE --name NAME")
    if len(alive) > 1:
        raise BadRequest(f"{len(alive)} servers run here; name one with --server: {', '.join(alive)}")
    return alive[0]


def page(content: dict[str, Any], before: dict[str, Any] | None = None, *, is_watching: bool = False) -> str:
    """A status for people.

    Args:
        before: an earlier one of the same server, for what went on between.
        is_watching: there will be more pages, so that this one has all lines that they have.
    """
    arena, prefetch, memory = (content[name] for name in ("arena", "prefetch", "memory"))
    lines = [
        f"server {content['name']}: {content['state']}, pid {content['pid']}, up {_duration(content['uptime_s'])}, "
        f"version {content['version']}, epoch {content['epoch']:x}",
        *(f"  ! {_plain(reason)}" for reason in content["reasons"]),
        *([_going_on(content, before)] if is_watching or before is not None else []),
        f"  memory     {_size(memory['shared'])} shared, {_size(memory['private'])} private, "
        f"{_size(memory['page_cache'])} of the stores in the page cache",
        f"  arena      {_size(arena['total'])}: {_size(arena['used'])} used, {_size(arena['leased'])} leased, "
        f"{_size(arena['filling'])} filling; hit rate {_share(content['hit_rate'])}, {content['evictions']} evictions",
        *_disk(content["disk"]),
        f"  prefetch   {prefetch['hinted']} bundles: {prefetch['useful']} useful, {prefetch['late']} late, "
        f"{prefetch['wasted']} wasted",
        *(line for model in content["models"] for line in _model(model)),
        *_gpus(content),
        *_sessions(content),
    ]
    ill = [thread["name"] for thread in content["threads"] if not thread["alive"]]
    lines.append(f"  threads    {len(content['threads'])}, {'dead: ' + ', '.join(ill) if ill else 'all well'}")
    if content["metrics"]:
        lines.append(f"  metrics    {content['metrics']}")
    return "\n".join(lines)


def _going_on(content: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Rates since the look before, by the server's own clock; of another server than before there are none."""
    if before is None or before["epoch"] != content["epoch"] or content["uptime_s"] <= before["uptime_s"]:
        return "  now        n/a tokens/s, n/a MB/s from disk, hit rate n/a"
    seconds = content["uptime_s"] - before["uptime_s"]
    tokens, hits, misses = (content[name] - before[name] for name in ("tokens", "hits", "misses"))
    nbytes = content["disk"]["bytes"] - before["disk"]["bytes"]
    rate = _share(hits / (hits + misses) if hits + misses else None)
    return f"  now        {tokens / seconds:.1f} tokens/s, {nbytes / seconds / 1e6:.1f} MB/s from disk, hit rate {rate}"


def _disk(disk: dict[str, Any]) -> Iterator[str]:
    yield (
        f"  disk       {_size(disk['bytes'])} in {disk['reads']} reads of {_number(disk['bundles_per_read'])} bundles; "
        f"a layer takes {_ms(disk['latency_p50_s'])}, 99 % under {_ms(disk['latency_p99_s'])}"
    )
    yield from (f"    {_plain(reason)}" for reason in disk["reasons"])


def _model(model: dict[str, Any]) -> Iterator[str]:
    where = "all in memory" if model["is_resident"] else f"{model['n_resident']} of {model['n_slots']} slots used"
    yield (
        f"  model      {model['name']}: {model['state']}, {model['dtype']}, {where}, "
        f"fingerprint {model['fingerprint']['weights'][:12]}"
    )
    rates = [rate for rate in model["hit_rate_by_layer"] or [] if rate is not None]
    if rates and not model["is_resident"]:
        yield f"    hits by layer  {' '.join(f'{rate:.0%}' for rate in rates)}"


def _gpus(content: dict[str, Any]) -> Iterator[str]:
    for child in content["gpu_children"]:
        error = f"; {child['errors']} errors, the last: {_plain(child['last_error'])}" if child["errors"] else ""
        yield (
            f"  gpu        {child['name'] or child['uuid']}: {child['state']}, {_size(child['bytes_pushed'])} in "
            f"{child['pushes']} pushes, {child['slabs']} slabs{error}"
        )
    for name, lent in (content["shared_dense"] or {"models": {}})["models"].items():
        yield (
            f"  gpu {content['shared_dense']['device']:<6} {_size(lent['nbytes'])} of {name} for all: {lent['state']}, "
            f"used by {lent['borrowers']} sessions"
        )


def _sessions(content: dict[str, Any]) -> Iterator[str]:
    yield f"  sessions   {len(content['sessions'])} (at most {content['max_sessions']} for each model)"
    if content["sessions"]:
        yield "      PID  MODEL             TOKENS  TOKENS/S  HITS          RECALL  LEASES  LAST ERROR"
    for session in content["sessions"]:
        state = "" if session["state"] == "open" else session["state"]
        yield (
            f"  {session['pid']:7}  {session['model'][:16]:16} {session['tokens']:7}  {session['tokens_per_s']:8.1f}  "
            f"{_share(session['hit_rate']):>4}  {_recall(session):>14}  {session['leases']:6}  "
            f"{_plain(session['last_error'] or state)}"
        ).rstrip()


def _plain(text: str) -> str:
    """One line, that does nothing to a terminal: it may repeat what a stranger has sent."""
    return "".join(c if c.isprintable() else " " for c in text)


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
