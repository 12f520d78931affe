"""Becomes the product's entry under strace, which records what any of its processes writes, or what it reads.

Owns: which calls are recorded. Must not know: what is looked for.
Invariant: the server keeps this process's id.

    python -m tests.sagemaker_entry.traced LOG [writes | reads]
"""

from __future__ import annotations

import os
import sys

WRITES = "write,pwrite64,writev,pwritev,pwritev2,sendto,sendmsg,sendfile,splice,copy_file_range"
READS = "read,pread64,readv,preadv,preadv2,mmap,clone,clone3,fork,vfork"
SHOWN = {
    "writes": ["-xx", "-s", "2000000", "-e", f"trace={WRITES}"],  # all that is written
    "reads": ["-y", "-s", "0", "-e", f"trace={READS}"],  # which file, where, and who started whom
}


def main(log: str, which: str = "writes") -> None:
    options = ["-D", "-f", "-qq", "--seccomp-bpf", *SHOWN[which], "-o", log]
    os.execvp("strace", ["strace", *options, sys.executable, "-m", "sagemaker_entry", "serve"])


if __name__ == "__main__":
    main(*sys.argv[1:])
