"""Programs of clients that fork. Which of these is run is the one that is told first: a model's, or a session's."""

OPEN_SESSION = """
import numpy as np
from telling import given, hear, tell
from sparseflow.client.weight_client import WeightClient

def use():
    with client.fetch(1, np.arange(5, dtype=np.uint32)) as fetch:
        return fetch.wait(30).slots.tolist()

client = model = WeightClient(given["name"])
use()
"""

OPEN_MODEL = """
import numpy as np
from telling import generate, given, hear, open_model, tell

def use():
    return generate(model, given["prompt"], 20)

model = open_model()
client = model.source
use()
"""

FORK = """
import os
from sparseflow.errors import BadRequest

before = use()
reading, writing = os.pipe()
child = os.fork()
if not child:
    texts = []
    for way in (use, client.dense, lambda: client.hint(0, np.arange(3, dtype=np.uint32))):
        try:
            way()
        except BadRequest as error:
            texts.append(str(error))
    model.close()
    tell(texts)
    os.close(writing)
    os.read(reading, 1)  # until the parent is gone, or says so
    if given["child_ends"] == "as a program":
        raise SystemExit(0)
    os._exit(0)
os.close(reading)
tell(child)
hear()
"""

CHILD_FIRST = (
    FORK
    + """
os.close(writing)
assert os.waitpid(child, 0)[1] == 0
tell(use() == before)
hear()
model.close()
"""
)

PARENT_CLOSES = (
    FORK
    + """
model.close()
tell("closed")
hear()
os.close(writing)
assert os.waitpid(child, 0)[1] == 0
"""
)
