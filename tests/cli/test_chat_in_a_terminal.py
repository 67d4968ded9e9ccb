"""`sparseflow chat` in a terminal: Ctrl-C stops an answer, arrow keys bring lines back, Ctrl-D ends."""

import time
from pathlib import Path

from terminal import Terminal

# Each token takes a while, so that an answer can be stopped.
SLOW_CHAT = """
import sys, time
from sparseflow.cli.main import main
from sparseflow.models.opt_sparse import SparseOPTForCausalLM

forward = SparseOPTForCausalLM.forward

def slow(*arguments, **named):
    time.sleep(0.05)
    return forward(*arguments, **named)

SparseOPTForCausalLM.forward = slow
sys.exit(main(["chat", {store!r}, "--max-new-tokens", "400"]))
"""
UP = "\x1b[A"


def test_a_session_outlives_ctrl_c_and_remembers_lines(demo_store: Path) -> None:
    with Terminal(SLOW_CHAT.format(store=str(demo_store))) as terminal:
        assert "weights:  " in terminal.read_until("> ")
        terminal.type("To be, or\n")
        terminal.read_until("To be, or\r\n")
        first = terminal.read_until(" ", 30)  # the answer has begun; all of it would take 20 s
        terminal.type("\x03")
        first += terminal.read_until("> ", 10)
        terminal.type(UP + "\n")
        assert "To be, or" in terminal.read_until("\r\n")  # as it was typed before
        terminal.read_until(" ", 30)
        terminal.type("\x03")
        terminal.read_until("> ", 10)
        time.sleep(0.5)  # a person is no quicker: Python hears of a signal once it waits for keys
        terminal.type("\x03")
        assert "Ctrl-D or /exit ends" in terminal.read_until("> ", 10)
        terminal.type("/reset\n")
        terminal.read_until("> ")
        terminal.type("To be, or\n")
        terminal.read_until("To be, or\r\n")
        again = terminal.read_until(" ", 30)
        terminal.type("\x03")
        again += terminal.read_until("> ", 10)
        shorter = min(len(first.split("\r\n")[0]), len(again.split("\r\n")[0]), 12)
        assert first[:shorter] == again[:shorter]  # from the beginning, after /reset
        terminal.type("\x04")
        code, rest = terminal.read_to_end()
    assert code == 0
    assert "Traceback" not in rest
