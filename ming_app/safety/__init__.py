"""Safety of what is said: red flags in a person's messages, checks of an answer, AI label and disclaimer. Deterministic,
independent of any model; pure functions on text. Rules are data (rules/*.toml), each with its source."""
