"""Differentially private training on one site: clip, sum, integer grid, discrete Gaussian.

Order of calls: `mechanism.Mechanism(model, terms, loss)` once, then `release(inputs, targets)` a round.
Inside it, `sampling` chooses the rows by independent coins, `bookkeeping` returns the sum of clipped
per-example gradients, `grid` turns it into integers of known sensitivity, and `randomness` supplies the coins
and the noise. Import the modules by name: `grid` and `randomness` load without torch.
"""
