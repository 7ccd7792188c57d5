"""Record layers in a forward pass, certify how each layer can be measured, and compute the layers' block traces.

The modules of this package use these terms.

The *block trace* of two filters is the trace of the block of the layer's Hessian that belongs to these filters. The
*classifier* is a linear layer at the end of the network. To *certify* a property means to check it numerically on the
given samples, and to raise an error or return a reason if the check fails. A *certificate* is such a check.

The *tail* of a layer is the operations from its output to the classifier's input. The *closed form* is a formula for
the whole Hessian, which holds for some tails. Layers for which it does not hold are measured by the *Gauss-Newton*
method (``methods.py``).

A *pass of our own* is a forward pass that this package makes by itself. *The user's pass* is one that the user's code
makes, for example in validation. To *observe* a pass means to record it while it runs in the modes and the precision of
the user's passes.
"""
