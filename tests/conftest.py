"""Names the plugins that hold the fixtures; see each of them for what it offers."""

from __future__ import annotations

pytest_plugins = [
    "tests.fix_ci",
    "tests.fix_cluster",
    "tests.fix_backup",
    "tests.fix_scene",
    "tests.fix_encryption",
    "tests.fix_s3",
    "tests.fix_azure",
]
