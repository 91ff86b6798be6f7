"""The local step of a round: plan, learners, refit, and the exchange between link and trainer."""
