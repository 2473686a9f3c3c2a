"""`tove` with a hook on the training loop: writes which records each batch had, and may be slow.

RECORDS: a folder, into which process I writes ``I-of-N.jsonl``, a line for each batch. SLOW: ``I:seconds`` a batch.
LATE: ``I:seconds`` before the first batch. HOLD: ``I:batch``, before which process I waits for RELEASE, a file; once it
is there nobody is slow either. DIFFER_I: further arguments of process I.
"""

import json
import os
import sys
import time
from pathlib import Path


def hook():
    from tove_jax.train import loop

    fetch = loop._Run.fetch
    me, count = os.environ.get("JAX_PROCESS_ID", "0"), os.environ.get("JAX_NUM_PROCESSES", "1")
    slow, _, seconds = os.environ.get("SLOW", "").partition(":")
    late, _, delay = os.environ.get("LATE", "").partition(":")
    held, _, number = os.environ.get("HOLD", "").partition(":")
    release = Path(os.environ.get("RELEASE", "never"))
    fetched = 0
    path = Path(os.environ["RECORDS"]) / f"{me}-of-{count}.jsonl" if os.environ.get("RECORDS") else None
    if path:
        path.unlink(missing_ok=True)  # of an attempt before this one

    def hooked(self):
        nonlocal fetched
        fetched += 1
        if slow == me and not release.exists():
            time.sleep(float(seconds))
        if late == me and fetched == 1:
            time.sleep(float(delay))
        while held == me and fetched == int(number) and not release.exists():
            time.sleep(0.05)
        found = fetch(self)
        if path:
            with path.open("a") as stream:
                stream.write(json.dumps(found[1]["records"].tolist()) + "\n")
        return found

    loop._Run.fetch = hooked


if __name__ == "__main__":
    from tove_jax.cli.main import main

    if any(os.environ.get(name) for name in ("RECORDS", "SLOW", "LATE", "HOLD")):
        hook()
    if differ := os.environ.get(f"DIFFER_{os.environ.get('JAX_PROCESS_ID')}"):
        sys.argv += differ.split()
    sys.exit(main())
