"""Weight servers of this user: where their sockets are, who lives, who is ill, and what the dead have left."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sparseflow.doctor.finding import Check, Finding, Found, Group, of_error
from sparseflow.errors import BadRequest, NoAnswer, NotPermitted, ServerNotRunning, SparseFlowError
from sparseflow.protocol.inquiry import ask_status
from sparseflow.protocol.messages import PROTOCOL_VERSION
from sparseflow.protocol.run_directory import RunDirectory, folder_names, require_private, runtime_dir

_ANSWER_S = 3.0
_AT_ONCE = 8
_LONGEST_NAME = 64
_OTHER = "set SPARSEFLOW_RUNTIME_DIR to a short folder of your own, of mode 0700"


def group(version: str) -> Group:
    """The runtime directory, and every server there. version: of SparseFlow here."""
    return Group(
        "Servers",
        [Check("runtime directory", runtime_directory), Check("servers", lambda: servers(version), deadline_s=30.0)],
    )


def runtime_directory() -> Finding:
    """Whether servers can put their sockets there: whose it is, its mode, and how long its path is."""
    name, folder = "runtime directory", runtime_dir()
    longest = _longest_name()
    if not longest:
        return Finding(name, "problem", f"{folder}: no socket's path can be so long", _OTHER)
    try:
        require_private(folder)
        text = f"{folder}, which only user {os.getuid()} can enter"
    except FileNotFoundError:
        text = f"{folder}, which the first server makes"
        if reason := _cannot_be_made(folder):
            return Finding(name, "problem", f"{folder} cannot be made: {reason}", _OTHER)
    except NotPermitted as error:
        return of_error(name, "problem", error)
    except OSError as error:
        return Finding(name, "problem", f"{folder}: {error.strerror}", _OTHER)
    if longest < _LONGEST_NAME:
        return Finding(name, "note", f"{text}; names of servers have {longest} letters at most there", _OTHER)
    return Finding(name, "ok", text)


def servers(version: str) -> Found:
    """One finding for each folder there."""
    names = folder_names()
    if not names:
        return Found([Finding("servers", "ok", "none runs, and none has left anything")])
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return Found(list(pool.map(lambda name: server(name, version), names)))


def server(name: str, version: str) -> Finding:
    """How one is, by what it says within seconds."""
    title = f"server {name}"
    try:
        directory = RunDirectory.of(name)
    except BadRequest as error:
        return Finding(title, "note", f"is no server's folder: {error}", f"look at {runtime_dir() / name}")
    try:
        require_private(directory.path)
        if not directory.is_alive():
            return _dead(title, directory)
        return _of_status(title, ask_status(name, _ANSWER_S), version)
    except (ServerNotRunning, FileNotFoundError):
        return Finding(title, "note", "has just ended", "start it again, if that was not meant")
    except NoAnswer:
        pid = directory.owner()
        remedy = f"if it was stopped, kill -CONT {pid}; else see its log, and end it: kill -9 {pid}"
        return Finding(title, "problem", f"pid {pid} said nothing within {_ANSWER_S:g} s", remedy)
    except SparseFlowError as error:
        return of_error(title, "problem", error)


def _dead(title: str, directory: RunDirectory) -> Finding:
    owner = directory.owner()
    text = f"has ended{f' (it was pid {owner})' if owner else ''} and left {directory.path}"
    return Finding(title, "warning", text, f"start it again, which clears that, or: rm -r {directory.path}")


def _of_status(title: str, status: Mapping[str, Any], version: str) -> Finding:
    state, ask = status["state"], f"sparseflow status --server {status['name']}"
    text = (
        f"{state}, pid {status['pid']}, version {status['version']}, "
        f"{', '.join(model['name'] for model in status['models'])}, "
        f"{len(status['sessions'])} sessions (at most {status['max_sessions']} for each model)"
    )
    if status["protocol"] != PROTOCOL_VERSION:
        told = f"{text}; speaks protocol {status['protocol']}, this version {PROTOCOL_VERSION}"
        return Finding(title, "problem", told, f"end it (kill {status['pid']}), and start one of this version")
    if state == "degraded":
        return Finding(title, "problem", f"{text}; {'; '.join(status['reasons'])}", f"{ask}; then start it again")
    if status["version"] != version:
        told = f"{text}; this is {version}"
        return Finding(title, "warning", told, f"end it (kill {status['pid']}), and start one of this version")
    if state != "ready":
        return Finding(title, "note", text, f"wait; {ask} --watch 1 shows how it goes")
    return Finding(title, "ok", text)


def _longest_name() -> int:
    """Letters of the longest name whose sockets have a path that a socket takes; 0: there is none."""
    for n in range(_LONGEST_NAME, 0, -1):
        try:
            RunDirectory.of("a" * n)
            return n
        except BadRequest:
            continue
    return 0


def _cannot_be_made(folder: Path) -> str:
    """Why a folder that is not there cannot be made; empty where it can."""
    parent = next(parent for parent in folder.parents if os.path.lexists(parent))
    if not parent.is_dir():
        return f"{parent} is no folder"
    return "" if os.access(parent, os.W_OK | os.X_OK) else f"{parent} cannot be written to"
