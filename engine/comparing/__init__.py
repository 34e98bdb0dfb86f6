"""A blind comparison: people vote on two answers to a question without knowing which model wrote which."""
