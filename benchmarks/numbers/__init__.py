"""What the package measures on some two hundred small cases, to see that a change of the code leaves the numbers alone.

    python -m benchmarks.numbers measure --out old.json        # in a checkout of the one commit
    python -m benchmarks.numbers measure --out new.json        # in that of the other
    python -m benchmarks.numbers compare old.json new.json     # exit code 1 if something is different

Only public names are used, so it runs on any commit; where there is no such folder yet, put a link to it. A case is a
name and a function; what that returns is flattened to numbers, labels that must stay too, and texts that may be
reworded. All is in float64, but for cases that have float32 in their name.
"""
