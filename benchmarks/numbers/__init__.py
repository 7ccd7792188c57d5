"""Record what the package measures in some two hundred small cases, to show that a change of code changes no number.

    python -m benchmarks.numbers measure --out old.json        # in a checkout of the one commit
    python -m benchmarks.numbers measure --out new.json        # in that of the other
    python -m benchmarks.numbers compare old.json new.json     # exit code 1 if something is different

The cases use only public names, so they run on any commit. In a checkout that does not have this folder yet, make a
link to it. A case has a name and a function. The result of the function is flattened to numbers and labels, which must
not change, and texts, which may be reworded. Cases run in float64 unless their name contains float32.
"""
