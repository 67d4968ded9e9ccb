"""How a command speaks of what it warns of: as it does of errors, or as JSON where that is asked for."""

import logging

from sparseflow.utils.logs import formatter
from sparseflow.utils.parsing import one_line


class Voice(logging.Formatter):
    """Warnings as people read them; what is below them, with its time and logger."""

    def __init__(self) -> None:
        super().__init__()
        self._of_details = formatter("text")

    def format(self, record: logging.LogRecord) -> str:
        """One line, and below it the traceback where there is one."""
        if record.levelno < logging.WARNING:
            return self._of_details.format(record)
        line = f"sparseflow: {record.levelname.lower()}: {one_line(record.getMessage())}"
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"
