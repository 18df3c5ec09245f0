"""Damaged inputs for loaders, and a search for one that a loader does not refuse as documented.

`damaged_bytes`, `damaged_tree` and `damaged_json` make one wrong input of a right one: a flipped bit, a slice that is
missing or comes twice, a huge number, another type, a key that comes twice, NaN, deep nesting. `search` gives a loader
many inputs in two processes, each with little memory and a clock, and returns the faults and a count.
Used by tests/test_fuzz.py.
"""
import collections
import json
import multiprocessing
import os
import re
import resource
import signal
import traceback
from concurrent.futures import ProcessPoolExecutor

PROCESSES = 2
MEMORY = 256 * 2 ** 20      # bytes that a loader may map beyond what the process has: the files have some kilobytes
SECONDS = 20                # for one input: it takes a millisecond, and a busy machine may stop the process for a while
LONGEST_MESSAGE = 1000      # characters: one clear line
NUMBERS = (0, -1, 1, 2, 255, 256, 2 ** 31, 2 ** 32 - 1, 2 ** 62, 2 ** 63, 2 ** 64, 10 ** 10, 10 ** 30, 10 ** 400,
           0.5, 1e308, -0.0, float("inf"), float("-inf"), float("nan"))
VALUES = (None, True, False, "", "x", "\ud800", "\0", "NaN", [], {}, [[]], [0], {"": 0}, *NUMBERS)
BYTES = (b"", b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b'"', b"\\", b"[", b"{", b"}", b"NaN", b"Infinity", b"1e999",
         b"null", b"\xef\xbb\xbf", b"\r\n", bytes(8), b"\xff" * 8)


def damaged_bytes(content, rng):
    """The bytes with one to four faults."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.randrange(8)
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 2, 8, 64, len(content))))
        if kind == 0 and content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[start:]
        elif kind == 2:
            del content[start:end]
        elif kind == 3:
            content[start:start] = content[start:end]
        elif kind == 4:
            content[start:end] = rng.randbytes(min(end - start, 64))
        elif kind == 5:
            content[start:start] = rng.choice(BYTES)
        elif kind == 6:
            # A length or an offset of a binary header.
            content[start:start + 8] = rng.choice((2 ** 40, 2 ** 63 - 1, len(content), 10 ** 10)).to_bytes(8, "little")
        else:
            _change_number(content, rng)
    return bytes(content)


def _change_number(content, rng):
    """Another number in place of one that is written in digits."""
    found = list(re.finditer(rb"\d+", content))
    if found:
        place = rng.choice(found)
        content[slice(*place.span())] = repr(rng.choice(NUMBERS)).encode()


def damaged_tree(value, rng):
    """A value of JSON with one node changed, removed, or repeated. The value itself stays as it is."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        changed = value.copy()
        kind = rng.randrange(12)
        if kind == 0:
            del changed[key]
        elif kind == 1 and isinstance(value, list):
            changed.insert(key, value[key])
        elif kind == 1:
            changed[rng.choice(("", "x", key.upper(), key + "\n"))] = changed.pop(key)
        else:
            changed[key] = damaged_tree(value[key], rng)
        return changed
    if isinstance(value, str) and rng.random() < 0.5:
        return damaged_bytes(value.encode(), rng).decode("utf-8", rng.choice(("replace", "surrogateescape")))
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value), [value]))
    return rng.choice(VALUES)


def damaged_json(value, rng):
    """The bytes of a file of JSON: a damaged tree, damaged bytes, a key that comes twice, or deep nesting."""
    kind = rng.randrange(10)
    if kind < 6:
        return json.dumps(damaged_tree(value, rng)).encode()
    text = json.dumps(value)
    if kind == 6:
        depth = rng.choice((10, 500, 990, 100_000))
        place = rng.choice([match.start() for match in re.finditer(r"[\d\[{\"]", text)] or [0])
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        return (text[:place] + opening * depth + "0" + closing * depth + text[place:]).encode()
    if kind == 7 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return (text[:-1] + f", {json.dumps(key)}: {json.dumps(damaged_tree(value[key], rng))}}}").encode()
    if kind == 8:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    return damaged_bytes(text.encode(), rng)


def search(read, make, errors, count, seed=0):
    """(faults, Counter of "read" and the first words of errors) of `count` inputs.

    read(input) is the loader, make(rng) an input; rng is a random.Random of its own for each input, so that a fault can
    be repeated: make(random.Random(f"{seed}-{i}")). A fault is any exception but `errors`, a message of more than one
    line, memory beyond MEMORY, or time beyond SECONDS.
    """
    global _task
    _task = read, make, errors, seed
    parts = [range(i, count, 4 * PROCESSES) for i in range(4 * PROCESSES)]
    # Forked: read and make need not be pickled, and a child has only the memory that is given to it.
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("fork"), initializer=_restrict) as pool:
        faults, counts = zip(*pool.map(_search_part, parts))
    return sum(faults, []), sum(counts, collections.Counter())


def _restrict():
    if os.path.exists("/proc/self/statm"):      # Linux: elsewhere the memory of a process cannot be limited so
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    signal.signal(signal.SIGALRM, _too_slow)


class TooSlow(BaseException):
    """Not an Exception: a loader that turns every Exception into its own error does not hide it."""


def _too_slow(number, frame):
    raise TooSlow(f"no answer in {SECONDS} s")


def _search_part(indices):
    import random
    read, make, errors, seed = _task
    faults, counts = [], collections.Counter()
    for i in indices:
        content = make(random.Random(f"{seed}-{i}"))
        signal.alarm(SECONDS)
        try:
            read(content)
            counts["read"] += 1
        except errors as error:
            message = str(error)
            counts[type(error).__name__] += 1
            if "\n" in message or not 0 < len(message) <= LONGEST_MESSAGE:
                faults.append((i, repr(content)[:300], f"a message of {len(message)} characters: {message[:300]!r}"))
        except (Exception, TooSlow):
            faults.append((i, repr(content)[:300], traceback.format_exc(limit=-4)))
        finally:
            signal.alarm(0)
        if len(faults) > 20:
            break
    return faults, counts
