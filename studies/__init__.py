"""The reference study: does flatness predict generalization?

Run it with ``python -m studies --help``. Its results are in ``docs/study.md``.

``families`` lists the networks as data, and ``training`` trains many networks at once. It keeps snapshots, which are
the weights of a network at one moment of training. ``measuring`` measures snapshots with the public functions of the
package, and ``tables`` stores one row for each snapshot in CSV files. ``analysis`` and ``verdicts`` use only these
files. ``page`` writes ``docs/study.md`` from their results.
"""
