"""Two processes of one run on this machine."""

import socket
import subprocess
import sys

from conftest import ROOT, python_environment

from helpers.forked import start_forked


class Together:
    """Two processes of one run with their output in files; `devices`: of each."""

    def __init__(self, arguments, folder, devices: int = 4, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder = folder
        self.members = []
        for index in range(2):
            variables = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }
            with (folder / f"out{index}").open("w") as out, (folder / f"err{index}").open("w") as e:
                if index:
                    member = start_forked(
                        arguments, devices, stdout=out, stderr=e, **variables, **environment
                    )
                else:  # with another hash seed: both shall do the same in the same order
                    member = subprocess.Popen(
                        [sys.executable, *map(str, arguments)],
                        cwd=ROOT,
                        env=python_environment(devices, **variables, **environment),
                        stdout=out,
                        stderr=e,
                    )
            self.members.append(member)

    def output(self, name: str) -> str:
        return (self.folder / name).read_text()

    def statuses(self, seconds: float = 600) -> list[int]:
        """Of both, when they have ended."""
        try:
            return [member.wait(seconds) for member in self.members]
        finally:
            for member in self.members:
                member.kill()

    def wait(self) -> None:
        """Until both have ended, with status 0."""
        statuses = self.statuses()
        assert statuses == [0, 0], [self.output(f"err{index}") for index in range(2)]
