"""Generation: sampling, the step from state to state, and the compiled programs around it."""
