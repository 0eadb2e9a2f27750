"""The optional C kernel; everything else about the package is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "dbmodule._kernel",
            ["dbmodule/_kernel.c"],
            extra_compile_args=["-O3"],
            py_limited_api=True,
            # Without a compiler the numpy twin serves.
            optional=True,
        )
    ],
)
