"""Bugs planted into the text of a .cu file, and how the tests of the kernels tell what detects them.

A mutant is (bug in words, right text, wrong text, what detects it): "checker" (a checker of the emulator raises Fault),
"numbers" (a result is wrong), or "bytes" (the count of bytes is wrong).
"""
import re

import pytest

from minilm.kernels import emulator, launch


def each(mutants):
    """Parametrizes a test over mutants, by their words."""
    return pytest.mark.parametrize("mutant", mutants, ids=[words for words, *_ in mutants])


def plant(monkeypatch, module, mutant):
    """Lets a module of minilm.kernels launch its kernels with the bug in them."""
    words, right, wrong, _ = mutant
    function, text = module.function, text_of(module)
    assert right in text, f"{words}: no longer in {name_of(module)}.cu: {right}"
    monkeypatch.setattr(module, "function", lambda *arguments, **constants: function(
        *arguments, text=text.replace(right, wrong), **constants))


def all_in_one(module, mutants, names):
    """One text with a copy of the file for each mutant, compiled once: mutant i has _i after each of these names."""
    text, copies = text_of(module), []
    for i, (words, right, wrong, _) in enumerate(mutants):
        assert text.count(right) == 1, words
        copies.append(re.sub(rf"\b({'|'.join(names)})\b", rf"\1_{i}", text.replace(right, wrong)))
    return "\n".join(copies)


def use(monkeypatch, module, text, i):
    """Lets a module of minilm.kernels launch the kernels of mutant i of all_in_one."""
    def function(xp, name_of_module, name, dtype, **constants):
        return launch.function(xp, name_of_module, f"{name}_{i}", dtype, text=text, **constants)
    monkeypatch.setattr(module, "function", function)


def detected_by(check, module):
    """What detects a bug when check() runs under the checkers; None if nothing does.

    check() raises AssertionError for a wrong result, and returns whether the bytes are right.
    """
    try:
        with emulator.checked():
            return None if check() else "bytes"
    except emulator.Fault as fault:
        assert f"{name_of(module)}.cu:" in str(fault), fault
        return "checker"
    except AssertionError:
        return "numbers"


def text_of(module):
    return (launch.FOLDER / f"{name_of(module)}.cu").read_text()


def name_of(module):
    return module.__name__.rpartition(".")[2]
