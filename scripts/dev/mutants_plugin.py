"""The pytest plugin of scripts/dev/mutants.py. Not a script."""
import os

import pytest
from hypothesis import Phase, settings


@pytest.hookimpl(tryfirst=True)
def pytest_collection():
    # The first failing example is enough: no shrinking, and no database of examples for the next bug.
    settings.register_profile("mutants", settings.default, database=None, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutants")


def pytest_collection_modifyitems(items):
    words = os.environ["MUTANT_OF"].split()
    items.sort(key=lambda item: not any(word in item.name for word in words))
