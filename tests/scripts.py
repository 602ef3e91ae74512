"""Python files that are no modules of a package, as modules."""

import importlib.util


def loaded(path):
    """What a file defines, from its path."""
    spec = importlib.util.spec_from_file_location(path.stem.strip("_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
