"""Pushes a release in chunks of a mebibyte, in a process of its own that can be killed.

Usage: push.py FOLDER DESTINATION [EVENTS]: kills itself after so many chunks, between two of them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from packages import REPORT, SIGNATURE
from qexport.progress import Notice, Progress
from qexport.registries import Package, parse_destination, publish
from qexport.registries.oci import uploads

uploads.CHUNK = 1 << 20


def main() -> None:
    folder, destination = Path(sys.argv[1]), sys.argv[2]
    left = int(sys.argv[3]) if len(sys.argv) > 3 else -1

    def progress(event: Progress | Notice) -> None:
        nonlocal left
        if isinstance(event, Progress) and event.detail.startswith("layer"):
            print(event.done, flush=True)
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

    package = Package(
        folder, "notes", "1.4.0", "safetensors", "llama", "float16", "gptq", 134_515_008, ("Apache-2.0",),
        (REPORT, SIGNATURE),
    )  # fmt: skip
    print(publish(package, parse_destination(destination), progress=progress).reference)


if __name__ == "__main__":
    main()
