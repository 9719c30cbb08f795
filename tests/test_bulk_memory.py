"""Memory that batches need again is kept while they are explained, and given back afterwards."""

from __future__ import annotations

import ctypes
import sys

import pytest
import stored

ROUNDS = """
    import json, os, resource
    import numpy as np
    from spray.bulk.memory import keeping_memory

    def pages():
        "Pages that the system had to find while layers of a network, so to say, were filled and dropped."
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            layers = [np.full(1 << 20, 1.0) for _ in range(12)]  # 8 MB each
            del layers
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pages()
    usual, small = pages(), resident()
    with keeping_memory():
        pages()
        kept, large = pages(), resident()
    print(json.dumps([usual, kept, small, large, resident()]))
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_pages_are_found_once_and_go_back_at_the_end() -> None:
    done = stored.script(ROUNDS)
    assert done.returncode == 0, done.stderr
    usual, kept, small, large, after = map(int, done.stdout.strip("[]\n").split(","))
    assert kept < usual / 20
    # Ten rounds of 96 MB: held are those of one.
    assert 80e6 < large - small < 120e6
    assert after - small < 5e6


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from spray.bulk.memory import keeping_memory

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with keeping_memory():
        pass
