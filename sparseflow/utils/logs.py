"""Where the words of a process go: lines for people, or one JSON object a line for what collects logs."""

import logging
import os
import sys

from sparseflow.errors import BadRequest

LOG_FORMATS = ("text", "json")
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_RENAMED = {"levelname": "level", "name": "logger"}


def start_logging(default_level: str, log_format: str = "text") -> None:
    """Send what this process logs to stderr, from `$SPARSEFLOW_LOG` (else `default_level`) upwards.

    With `json` a line is one object: `time` (ISO 8601, UTC), `level`, `logger`, `message`, the fields that a record
    was given by `extra=`, and `exc_info` where there is a traceback.

    Raises:
        BadRequest: no such level or format.
    """
    level = os.environ.get("SPARSEFLOW_LOG", default_level).upper()
    if level not in logging.getLevelNamesMapping():
        raise BadRequest(f"SPARSEFLOW_LOG={level}: give one of DEBUG, INFO, WARNING, ERROR")
    if log_format not in LOG_FORMATS:
        raise BadRequest(f"log format {log_format!r}: give one of {', '.join(LOG_FORMATS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(log_format))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)


def formatter(log_format: str) -> logging.Formatter:
    """What writes a record as a line, in one of `LOG_FORMATS`."""
    if log_format == "text":
        return logging.Formatter(_TEXT)
    from pythonjsonlogger.json import JsonFormatter

    fields = ["levelname", "name", "message"]
    return JsonFormatter(fields, rename_fields=_RENAMED, timestamp="time")
