"""The reference study: does flatness predict generalization? ``python -m studies --help``; docs/study.md is its page.

The way of a number: ``families`` lists networks as data, and ``training`` trains many at once. ``measuring`` measures
their snapshots by the package's public functions; ``tables`` keeps a row of each in CSV files. ``analysis`` and
``verdicts`` read these files alone, and ``page`` writes what they find.
"""
