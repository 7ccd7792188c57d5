"""Record layers in a forward pass, certify by which method each can be measured, and compute their block traces."""
