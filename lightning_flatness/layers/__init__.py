"""What layers did in a forward pass, whether their numbers are exact, and their block traces."""
