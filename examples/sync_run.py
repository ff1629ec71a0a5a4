#!/usr/bin/env python3
"""The blocking client: run a command with an uploaded directory and save what it changed.

Usage: sync_run.py IMAGE DIRECTORY COMMAND [ARGUMENT...]
"""

import os
import sys

from afs.client import RunError, SyncAfsClient


def main(image: str, directory: str, command: list[str]) -> int:
    with SyncAfsClient(os.environ.get("AFS_PROXY", "127.0.0.1:62051")) as client:
        try:
            result = client.run(image, command, upload=directory, upload_to="/work", diff_to="diff.tar.gz", timeout=60)
        except RunError as error:  # nothing is known about the command
            print(f"{error.outcome.value}: {error}", "- it may work later" if error.retryable else "", file=sys.stderr)
            return 1
    print(result.stdout.decode(), end="")
    print(result.stderr.decode(), end="", file=sys.stderr)
    print(f"exit code {result.exit_code}, changed files in diff.tar.gz")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
