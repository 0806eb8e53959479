"""The options of FusedSGD: what they are, what is read of them at each step, what they keep in the state."""
