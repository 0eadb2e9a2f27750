"""One restore in a process of its own, which is killed when it makes its Nth file.

Arguments: repository directory, target, N; 0 is the moment before the control file is placed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from dbmodule.datafile import CONTROL_FILE
from dbmodule.listing import LATEST, resolve
from dbmodule.pgdata.target import LocalTargetDirectory, LocalTargetFile, staged_name
from dbmodule.ports import never_cancelled, no_progress
from dbmodule.repository.repository import Repository
from dbmodule.restore.run import RestoreRequest, restore
from dbmodule.storage import LocalStore

CLUSTER = "main"


class DyingTarget(LocalTargetDirectory):
    """Kills the process at file number `at`."""

    def __init__(
        self, root: Path, locations: Mapping[str, Path], owner: str, group: bool, at: int
    ) -> None:
        super().__init__(root, locations, owner, group)
        self._at = at
        self._made = 0
        self._counting = threading.Lock()

    def create(self, path: str, mode: int, size: int) -> LocalTargetFile:
        with self._counting:
            self._made += 1
            if self._made == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().create(path, mode, size)

    def finish(self, control_file: str) -> None:
        if self._at == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super().finish(control_file)


def main() -> None:
    url, target, at = sys.argv[1:]
    repository = Repository.open(LocalStore(Path(url)))
    manifests = repository.manifests(CLUSTER)
    restore(
        repository,
        manifests,
        RestoreRequest(resolve(manifests, LATEST, {}), Path(target), {}, threads=2),
        open_target=lambda root, locations, owner, group: DyingTarget(
            root, locations, owner, group, int(at)
        ),
        path_exists=os.path.lexists,
        staged_control=staged_name(CONTROL_FILE),
        progress=no_progress,
        cancelled=never_cancelled,
    )


if __name__ == "__main__":
    main()
