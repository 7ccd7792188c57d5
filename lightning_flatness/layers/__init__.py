"""Record layers in a forward pass, certify how each layer can be measured, and compute the layers' block traces.

A *pass of our own* is a forward pass that this package makes by itself. *The user's pass* is one that the user's code
makes, for example in validation. To *observe* a pass means to record it while it runs in the modes and the precision of
the user's passes.
"""
