"""What a process logs, as lines and as JSON."""

import json
import logging
import subprocess
import sys
from datetime import datetime

import pytest
from child_process import run_python

from sparseflow.errors import BadRequest
from sparseflow.utils.logs import formatter, start_logging


def record(message: str, **extra: object) -> logging.LogRecord:
    return logging.getLogger("sparseflow.here").makeRecord(
        "sparseflow.here", logging.WARNING, __file__, 1, message, (), None, extra=extra
    )


def test_text_is_one_line_with_time_level_and_logger() -> None:
    line = formatter("text").format(record("all is well"))
    assert line.endswith("WARNING sparseflow.here: all is well")
    assert "\n" not in line


def test_json_is_one_object_with_the_fields_that_the_record_was_given() -> None:
    found = json.loads(formatter("json").format(record('say "hi"\nthere', request_id=7)))
    assert datetime.fromisoformat(found.pop("time")).tzinfo is not None
    assert found == {
        "level": "WARNING",
        "logger": "sparseflow.here",
        "message": 'say "hi"\nthere',
        "request_id": 7,
    }


def test_json_keeps_a_traceback_in_its_line() -> None:
    code = """
import logging
from sparseflow.utils.logs import start_logging
start_logging("INFO", "json")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("sparseflow").exception("failed")
logging.getLogger("sparseflow").debug("not shown")
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    (line,) = finished.stderr.splitlines()
    found = json.loads(line)
    assert "ZeroDivisionError" in found["exc_info"]
    assert found["message"] == "failed"


@pytest.mark.parametrize("log_format", ["xml", "", "JSON"])
def test_unknown_format_is_refused_with_those_there_are(log_format: str) -> None:
    with pytest.raises(BadRequest, match="text, json"):
        start_logging("INFO", log_format)


def test_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFLOW_LOG", "LOUD")
    with pytest.raises(BadRequest, match="SPARSEFLOW_LOG=LOUD"):
        start_logging("INFO")


def test_logging_needs_no_torch() -> None:
    run_python("import sparseflow.utils.logs, sys; assert 'torch' not in sys.modules")
