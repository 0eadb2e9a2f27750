"""``pytest --encrypted``: every repository that a test makes without a key is an encrypted one.

So suites that know nothing of encryption run on encrypted repositories. Tests that look at what is
stored, by name or byte, fail then, as they should.
"""

from __future__ import annotations

import pytest

from dbmodule.ports import ObjectStore
from dbmodule.repository.repository import Repository
from dbmodule.repository.secret import Secret
from tests.fault import mini


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--encrypted", action="store_true", help="encrypt all repositories")


@pytest.fixture(scope="session", autouse=True)
def _encrypted(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--encrypted"):
        return
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    create, open_ = Repository.create, Repository.open

    def created(store: ObjectStore, secret: Secret | None = None) -> Repository:
        return create(store, secret or mini.SECRET)

    def opened(store: ObjectStore, secret: Secret | None = None) -> Repository:
        return open_(store, secret or mini.SECRET)

    patch.setattr(Repository, "create", staticmethod(created))
    patch.setattr(Repository, "open", staticmethod(opened))
    # For commands that tests run in processes of their own.
    patch.setenv("DBMODULE_REPOSITORY__KEY", mini.SECRET.text.decode())
