"""A real SSH server on the loopback address, with keys of its own: the other machine of an experiment."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import asyncssh

PYTHON = """#!/bin/sh
case "$*" in "-m pip install"*) exit 0;; esac
exec "{python}" "$@"
"""


class SSHServer:
    """A context manager: commands run in the local shell, with an environment and a home of their own.

    NNI updates itself by pip on each machine; the machine's `python` leaves that out.

    Args:
        home: Of the user, an empty directory.
        environment: Of all commands.

    Attributes:
        commands: That came through SSH.
        machine: An entry of `machineList`, in NNI's configuration.
    """

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        (home / "bin").mkdir(parents=True)
        for name in ("python", "python3"):
            python = home / "bin" / name
            python.write_text(PYTHON.format(python=sys.executable))
            python.chmod(0o755)
        key = asyncssh.generate_private_key("ecdsa-sha2-nistp256")
        key.write_private_key(str(home / "key"))
        (home / "authorized_keys").write_bytes(key.export_public_key())
        self.commands: list[str] = []
        self._home = home
        self._environment = {**environment, "HOME": str(home)}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> SSHServer:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.machine = {
            "host": "127.0.0.1",
            "port": self._server.get_port(),
            "user": "me",
            "sshKeyFile": str(self._home / "key"),
            "pythonPath": str(self._home / "bin"),
        }
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            authorized_client_keys=str(self._home / "authorized_keys"),
            process_factory=self._run,
            encoding=None,
            sftp_factory=True,
        )

    async def _close(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _run(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        assert process.command is not None
        self.commands.append(process.command)
        running = Popen(
            ["bash", "-c", process.command],
            cwd=self._home,
            env=self._environment,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
        )
        output, errors = await asyncio.to_thread(running.communicate)
        process.stdout.write(output)
        process.stderr.write(errors)
        process.exit(running.returncode)
