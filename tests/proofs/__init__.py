"""Slow proofs that the stages reach known optima and behave as stated; ``make prove`` runs them."""
