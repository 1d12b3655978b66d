"""Several threads may decode a type for the first time at the same moment."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, threading, types
import msgspec
from kalshi_platform import typed_json

DEFINED = '''
from __future__ import annotations
import msgspec
class Inner(msgspec.Struct):
    a: int
    b: dict[str, int] = {}
    c: int | None = None
class Middle(msgspec.Struct):
    inner: Inner | None = None
    more: dict[int, Inner] = {}
class Outer(msgspec.Struct):
    middle: dict[str, Middle]
    again: dict[str, Inner] = {}
'''
sys.setswitchinterval(1e-6)
for round in range(300):
    module = sys.modules[f"defined_{round}"] = types.ModuleType(f"defined_{round}")
    exec(DEFINED, module.__dict__)
    together = threading.Barrier(4)
    found = []
    def one():
        together.wait()
        found.append(typed_json.decode(b'{"middle":{"x":{"inner":{"a":1}}}}', module.Outer))
    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert [it.middle["x"].inner.a for it in found] == [1] * 4
"""


def test_first_use_of_a_type_from_several_threads_is_safe() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
