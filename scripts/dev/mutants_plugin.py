"""What pytest takes beside the project's conftest when scripts/dev/mutants.py runs it; not to be run."""
import os

import pytest
from hypothesis import Phase, settings


@pytest.hookimpl(tryfirst=True)
def pytest_collection():
    # The first example that fails is enough: none smaller is looked for, none is kept and tried on the next bug.
    settings.register_profile("mutants", settings.default, database=None, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutants")


def pytest_collection_modifyitems(items):
    words = os.environ["MUTANT_OF"].split()
    items.sort(key=lambda item: not any(word in item.name for word in words))
