"""Thin adapters to training frameworks, one file per framework."""


def missing(
    module: str, package: str, error: ImportError, source: str | None = None
) -> ImportError:
    """Return the error of an integration whose framework is absent or broken.

    Args:
        module: The name of the integration's module.
        package: The name of the framework's package on PyPI.
        error: What the import raised.
        source: What to give to ``pip install``; the package by default.
    """
    return ImportError(
        f"{module} needs the package {package}, which cannot be imported ({error}); run: "
        f"pip install {source or package}",
        name=error.name,
    )
