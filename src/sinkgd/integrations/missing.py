"""What an integration raises where its framework cannot be imported."""


def missing(module: str, package: str, error: ImportError) -> ImportError:
    """Return the error of an integration whose framework is absent or broken.

    Args:
        module: The integration.
        package: The name of the framework's distribution, as pip takes it.
        error: What the import raised.
    """
    return ImportError(
        f"{module} needs the package {package}, which cannot be imported ({error}); run: "
        f"pip install {package}",
        name=error.name,
    )
