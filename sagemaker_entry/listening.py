"""The listening socket: a TCP port, or a Unix socket for a container that has no network at all.

Owns: binding, the Unix socket's place in the file system from its making to its removal.
Must not know: HTTP, processes, settings beyond where to listen.
Invariant: a Unix socket is never open to more users than was asked, not even between bind and chmod; a file
that is no socket, and a socket on which somebody listens, are left as they are; what is removed at the end is
the socket that was made here, not one that another server has put in its place since.

A directory belongs to one server: it holds the directory's lock for as long as it lives, and the kernel gives
that up for one that was killed. So a socket that is found under the lock is a dead server's, also where a
profile of the container's forbids to find out by connecting.

Linux checks write permission on the socket and search permission on its directories at connect: unix(7).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sagemaker_entry.settings import UNIX, Settings, variable

BACKLOG: Final = 2048
DEFER_S: Final = 1
CLAIM_S: Final = 2.0  # for whoever listens there to be found listening


class ListenRefused(Exception):
    """Nothing can be served here; `hint` is the operator's next move."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound, listening socket; the rest is a Unix socket's, `made` its device and inode."""

    socket: socket.socket
    path: Path | None = None
    made: tuple[int, int] | None = None
    directory_fd: int | None = None

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def port(self) -> int | None:
        """The TCP port, None for a Unix socket."""
        return None if self.path is not None else int(self.socket.getsockname()[1])

    def close(self) -> None:
        """Listen no more; a Unix socket leaves the file system, and its directory is free."""
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):  # somebody tidied up
                if _identity(self.path) == self.made:
                    self.path.unlink()
        self.socket.close()
        if self.directory_fd is not None:
            os.close(self.directory_fd)


def listen(settings: Settings) -> Listener:
    """Return what the server listens on; raises ListenRefused."""
    if settings.listen is not None:
        return _on_path(Path(settings.listen.removeprefix(UNIX)), int(settings.socket_mode, 8))
    try:
        return Listener(_on_port(settings.host, settings.port))
    except OSError as error:
        raise ListenRefused(
            f"cannot listen on port {settings.port}: {os.strerror(error.errno or 0).lower()}",
            f"set `{variable('port')}`",
        ) from error


def _on_port(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
    # A worker hears of a connection with its first bytes: a request wakes it once, not twice,
    # and a client that says nothing wakes nobody until so many seconds are over.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER_S)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _on_path(path: Path, mode: int) -> Listener:
    """Return a listener at `path`, in place of one that nobody serves any more; raises ListenRefused."""
    with contextlib.ExitStack() as undo:
        try:
            directory_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, directory_fd)
            _claim(directory_fd, path)
            _clear(path)
            listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            mask = os.umask(0o777 & ~mode)  # of the whole process: nothing else runs in it yet
            try:
                listener.bind(str(path))
            finally:
                os.umask(mask)
            listener.listen(BACKLOG)
            made = _identity(path)
        except OSError as error:
            needed = f"its directory must be there, readable and writable for user {os.getuid()}"
            raise ListenRefused(
                f"cannot listen on `{path}`: {os.strerror(error.errno or 0).lower()}",
                f"{needed}, or set `{variable('listen')}`",
            ) from error
        undo.pop_all()
    return Listener(listener, path, made, directory_fd)


def _claim(directory_fd: int, path: Path) -> None:
    """Lock the directory for this process's life; raises ListenRefused where another server has it."""
    try:
        fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ListenRefused(
            f"another server has `{path.parent}`", "stop it, or choose another directory"
        ) from None


def _clear(path: Path) -> None:
    """Remove a socket that nobody listens on; raises ListenRefused for anything else that is there."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ListenRefused(f"`{path}` is there and is no socket", "remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(CLAIM_S)
        dead = caller.connect_ex(str(path)) in (errno.ECONNREFUSED, errno.EPERM)
    if not dead:
        raise ListenRefused(f"somebody listens on `{path}`", "stop them, or choose another path")
    path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
